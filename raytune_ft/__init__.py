"""From a YAML file to a merged and evaluated model, on a laptop or on a Ray cluster."""

__version__ = "0.1.0"
