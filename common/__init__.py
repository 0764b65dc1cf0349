"""Shared by recognition and detection: errors, files, flags, devices, images, the training loop."""
