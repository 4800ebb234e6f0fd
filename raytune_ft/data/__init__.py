"""Rows become examples, examples become tokens with a loss mask, tokens become micro-batches."""
