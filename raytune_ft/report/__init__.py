"""What a run or sweep left, for people: `report.html` and the output of the command line.

`collect` reads the directory, `tables` and `plots` describe it, `write` makes the page, and
`terminal` prints.
"""
