"""Every figure of a model directory, one value an example."""
