"""The detector: backbone, feature pyramid, head."""
