"""Boxes, anchors, and the suppression of overlapping detections."""
