"""The losses of a detector towards its annotations."""
