"""What people look at: `report.html`, one file that needs no network, made from a run's files.

`collect` reads the directory, `curves` and `verdicts` draw inline SVG, `searched` takes Optuna's
own plots, and `write` puts them into one page.
"""
