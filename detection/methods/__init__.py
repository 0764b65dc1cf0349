"""What can be trained: a method says what the engine does with a batch."""
