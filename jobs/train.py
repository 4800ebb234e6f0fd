"""`raytune-ft train` for a Ray job: `ray job submit -- python jobs/train.py ...`."""

import sys

from raytune_ft.cli import run_command

if __name__ == "__main__":
    sys.exit(run_command(["train", *sys.argv[1:]]))
