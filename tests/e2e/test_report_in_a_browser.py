"""The report as a browser shows it: no errors, no network, every plot drawn, a screenshot.

RAYTUNE_FT_SCREENSHOT names a file that keeps the picture.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from PIL import Image

from raytune_ft.report.write import write_report
from tests.support.reports import make_sweep_dir

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(400)]

CHROMIUM = "/usr/bin/chromium"
QUIET = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--hide-scrollbars",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--virtual-time-budget=20000",
    "--window-size=1180,4200",
]


@pytest.fixture
def page(tmp_path: Path) -> Path:
    if not Path(CHROMIUM).exists():
        pytest.skip(f"no browser: {CHROMIUM} is not installed (apt-get install chromium)")
    return write_report(make_sweep_dir(tmp_path / "letters"))


def chromium(page: Path, *arguments: str, complaint: str | None = None) -> str:
    """What it prints; on its console is nothing, or one line with `complaint`."""
    home = page.parent / "browser"
    # No proxy listens there: any network request of the page would fail and be logged.
    options = [f"--user-data-dir={home}", "--proxy-server=127.0.0.1:1", "--enable-logging=stderr"]
    done = subprocess.run(
        [CHROMIUM, *QUIET, *options, *arguments, page.as_uri()],
        check=True,
        capture_output=True,
        text=True,
        timeout=300,
    )
    said = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    if complaint is None:
        assert said == []  # an exception, a blocked request, a warning
    else:
        assert [complaint in line for line in said] == [True]
    return done.stdout


def test_every_plot_is_drawn(page: Path) -> None:
    document = chromium(page, "--dump-dom")
    assert "<title>letters: trial-000 is promoted" in document  # what data hold did not run
    # Plotly marks a plot that it has drawn.
    drawn = re.findall(r'<div class="plot js-plotly-plot" id="plot-(\d)"', document)
    assert drawn == [str(number) for number in range(8)]
    assert document.count('class="trace scatter') >= 13  # six curves, four candidates, ...
    assert document.count('class="trace bars"') == 3  # two of time, one of importances
    assert document.count('class="main-svg"') >= 8
    assert ">4 of 6 went on<" in document


def test_no_other_script_runs(page: Path) -> None:
    evil = page.with_name("evil.html")
    script = "<script>document.title = 'owned'</script>"
    evil.write_text(page.read_text().replace("<main>", f"<main>{script}"))
    document = chromium(evil, "--dump-dom", complaint="Content Security Policy")
    assert script in document
    assert "<title>letters: trial-000 is promoted" in document
    assert document.count("js-plotly-plot") >= 8


def test_the_picture(page: Path) -> None:
    picture = page.parent / "report.png"
    chromium(page, f"--screenshot={picture}")
    image = Image.open(picture).convert("RGB")
    assert image.size == (1180, 4200)
    colours = {colour: count for count, colour in image.getcolors(1 << 24) or ()}
    # The green of what won, the blue of the best trial, the paper and the ink.
    for colour in ((5, 150, 105), (37, 99, 235), (248, 250, 252), (15, 23, 42)):
        assert colours[colour] > 100, colour
    # It is not blank below the fold: every band of 300 rows of the text has its ink.
    for top in range(0, 2700, 300):
        assert len(image.crop((0, top, 1180, top + 300)).getcolors(1 << 24) or ()) > 20, top
    if kept := os.environ.get("RAYTUNE_FT_SCREENSHOT"):
        shutil.copy(picture, kept)
