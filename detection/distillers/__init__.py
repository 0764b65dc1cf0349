"""The losses of a student towards its teacher, and where they are taken."""
