"""`raytune-ft promote` for a Ray job: `ray job submit -- python jobs/promote.py ...`."""

import sys

from raytune_ft.cli import run_command

if __name__ == "__main__":
    sys.exit(run_command(["promote", *sys.argv[1:]]))
