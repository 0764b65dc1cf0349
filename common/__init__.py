"""What classification and detection stand on: errors, files, flags, devices, images, the training loop."""
