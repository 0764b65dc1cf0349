"""The detector: ResNet, feature pyramid, head."""
