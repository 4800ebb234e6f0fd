"""What is wrong with a machine or a cluster, before anything is spent on it."""
