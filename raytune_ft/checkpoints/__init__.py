"""Checkpoints as files: written whole or not at all, verified before use, thinned out by rule.

This package does not depend on what a checkpoint contains, so it imports no torch.
`train/checkpoint.py` writes and reads the contents; `promote/` turns a checkpoint into a model.
"""
