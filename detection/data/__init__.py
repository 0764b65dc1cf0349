"""Annotations and images, as batches."""
