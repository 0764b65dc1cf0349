"""Object detection in aerial images, and distillation for it: GFL detectors, Localization Distillation."""

import common  # noqa: F401 before torch: Ctrl-C during the imports is no error
