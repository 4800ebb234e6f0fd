"""From a model directory and a method to a module that can be trained."""
