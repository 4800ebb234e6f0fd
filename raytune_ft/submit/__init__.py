"""A run as a job of a Ray cluster: what it takes along, and how it is followed to its end."""
