"""A small run that really learned something."""

from tests.support.trained import _one_thread, inputs, run_dir, train, trained

__all__ = ["_one_thread", "inputs", "run_dir", "train", "trained"]
