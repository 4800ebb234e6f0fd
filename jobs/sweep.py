"""`raytune-ft sweep` for a Ray job: `ray job submit -- python jobs/sweep.py ...`."""

from raytune_ft.cli import main

if __name__ == "__main__":
    main("sweep")
