"""Drawn images for the demonstrations: ships as chips, and harbours and airfields as scenes."""
