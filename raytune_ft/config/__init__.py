"""What a run is: the schema, how a file becomes a config, which rules it must keep."""
