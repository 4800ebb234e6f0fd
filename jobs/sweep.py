"""`raytune-ft sweep` for a Ray job: `ray job submit -- python jobs/sweep.py ...`."""

import sys

from raytune_ft.cli import run_command

if __name__ == "__main__":
    sys.exit(run_command(["sweep", *sys.argv[1:]]))
