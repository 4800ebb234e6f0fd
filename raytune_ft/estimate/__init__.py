"""What a run needs before it starts: memory, traffic and time, from the model's config alone."""
