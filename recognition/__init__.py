"""T2FTS: stages, teachers, losses, the engine that trains them, and the test of what was trained."""

import common  # noqa: F401 before torch: Ctrl-C during the imports is no error
