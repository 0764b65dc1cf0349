"""Detectors of objects in aerial images, and their distillation."""

import common  # noqa: F401 before torch: Ctrl-C during the imports is no error
