"""`raytune-ft plan`: what a config would do, without doing it."""
