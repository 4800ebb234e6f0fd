"""`raytune-ft train` for a Ray job: `ray job submit -- python jobs/train.py ...`."""

from raytune_ft.cli import main

if __name__ == "__main__":
    main("train")
