"""T2FTS: stages, teachers, losses, the engine that trains them, and the test of what was trained."""
