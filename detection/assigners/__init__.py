"""Which anchors are to predict which objects."""
