"""`raytune-ft promote` for a Ray job: `ray job submit -- python jobs/promote.py ...`."""

from raytune_ft.cli import main

if __name__ == "__main__":
    main("promote")
