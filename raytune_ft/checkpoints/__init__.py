"""Checkpoints as files: written whole or not at all, verified before use, thinned out by rule.

Nothing here knows what is in a checkpoint, so nothing here imports torch. `train/state.py` writes
and reads the contents; `promote/` turns a checkpoint into a model.
"""
