"""Object detection in aerial images, and distillation for it: GFL detectors, Localization Distillation."""
