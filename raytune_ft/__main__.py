"""`python -m raytune_ft` is the command `raytune-ft`."""

from raytune_ft.cli import main

if __name__ == "__main__":
    main()
