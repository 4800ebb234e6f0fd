"""Models made of several: pure functions of tensors, and the walk that applies them to files."""
