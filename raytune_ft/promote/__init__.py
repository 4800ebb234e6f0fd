"""From a checkpoint to a model that others can load: fold, verify, evaluate, describe.

`fold` merges an adapter into its base, `evaluate` measures a model directory, `card` writes the
model card, and `promote` runs them in order and publishes the result with one rename.
"""
