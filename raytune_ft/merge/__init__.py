"""Adapters are folded into their base; models are merged, verified, written and exported."""
