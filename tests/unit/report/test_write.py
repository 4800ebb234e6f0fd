"""report.html says what the files say, escapes what they hold, and never fails a run."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest

from raytune_ft.cli import run_command
from raytune_ft.errors import StorageError
from raytune_ft.report import write
from raytune_ft.report.svg import Plot, bounds, shown, ticks
from raytune_ft.report.write import try_report, write_report
from tests.support.reports import EVIL


class Page(HTMLParser):
    """Elements, the text outside scripts, and all addresses."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.words: list[str] = []
        self.addresses: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [str(value) for name, value in attrs if name in ("src", "href")]
        assert not any(name.startswith("on") for name, _ in attrs)

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_the_page_of_a_sweep(sweep_dir: Path) -> None:
    path = write_report(sweep_dir)
    assert path == sweep_dir / "report.html"
    text = path.read_text()
    page = Page(text)
    said = " ".join(page.words)
    assert "trial-000 is promoted: eval_loss 3 → 1.1" in said
    assert "Difference to the base -1.9 (95% interval -2.1 to -1.7), on 40 examples" in said
    assert "uniform_soup looks better than trial-000 there" in said
    for title in (
        "Learning curves",
        "Candidates",
        "Gain and retention",
        "WiSE-FT",
        "Rungs",
        "Time",
        "Parameters and eval_loss",
        "Importance of parameters",
        "What they say",
        "config.yaml",
    ):
        assert title in said, title
    assert "4 of 6 went on" in said
    assert page.tags.count("svg") == 6
    # One file: nothing is asked of a network, and plotly is in it, packed.
    assert page.addresses == []
    assert 1_000_000 < len(text) < 2_500_000
    # What is better beyond its interval is green, what is not has no colour.
    assert re.search(r'class="number up">-1\.9<', text)
    assert re.search(r'class="number ">0\.5<', text)
    assert re.search(r'class="number down">0\.5<', text)


def test_a_promotion_on_a_few_examples(sweep_dir: Path) -> None:
    """They give no intervals."""
    path = sweep_dir / "promoted/evaluation.json"
    content = json.loads(path.read_text()) | {"improved": False}
    for row in [*content["candidates"], *content["differences"].values()]:
        row["interval"] = None
    path.write_text(json.dumps(content))
    said = " ".join(Page(write_report(sweep_dir).read_text()).words)
    assert "trial-000 is promoted, tied with the base on test" in said
    assert "95% interval not known of so few examples" in said
    assert "uniform_soup looks better than trial-000 there" in said
    assert "too few examples" in said


def test_what_data_hold_is_text(sweep_dir: Path) -> None:
    text = write_report(sweep_dir).read_text()
    assert EVIL not in text
    assert "<img" not in text
    page = Page(text)
    assert page.tags.count("script") == 3  # the plots, plotly, and what draws them
    assert EVIL in "".join(page.words)  # shown, not run
    plots = json.loads(re.search(r'id="plots">(.*?)</script>', text, re.S)[1])
    assert len(plots) == 2


def test_a_run_alone_has_a_small_page(sweep_dir: Path) -> None:
    run = sweep_dir / "trials" / "trial-000"
    (run / "config.yaml").write_text("name: one\ndata: {train: {path: train.jsonl}}\n")
    best = {"step": 30, "examples": 300, "eval_loss": 1.0}
    result = {"status": "completed", "base": {"eval_loss": 3.0}, "best": best}
    (run / "result.json").write_text(json.dumps(result))
    text = write_report(run).read_text()
    assert "eval_loss 1, base 3 (validation)" in text
    assert "Nothing was promoted yet" in text
    assert "training loss" in text
    assert len(text) < 30_000
    # One that is still running, and has measured nothing yet.
    (run / "result.json").unlink()
    (run / "metrics.jsonl").unlink()
    assert "Still running" in write_report(run).read_text()


def test_a_sweep_without_a_result_is_still_running(sweep_dir: Path) -> None:
    (sweep_dir / "result.json").unlink()
    shutil.rmtree(sweep_dir / "promoted")
    assert "Still running" in write_report(sweep_dir).read_text()


def test_a_report_that_fails_is_told(sweep_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: object) -> None:
        raise KeyError("figures")

    monkeypatch.setattr(write, "learning_curves", broken)
    said: list[str] = []
    try_report(sweep_dir, said.append)
    assert said == ["report.html was not written: KeyError: 'figures'"]
    assert not (sweep_dir / "report.html").exists()


def test_the_same_facts_in_the_terminal(
    sweep_dir: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert run_command(["report", str(sweep_dir)]) == 0
    said = capsys.readouterr().out
    assert "trial-000 is promoted: eval_loss 3 → 1.1" in said
    for line in ("uniform_soup", "-2.1000 to -1.7000", "trial-000 *", "report.html"):
        assert line in said
    assert run_command(["report", str(tmp_path)]) == 2
    assert "holds no config.yaml of a run" in capsys.readouterr().err
    with pytest.raises(StorageError):
        write_report(tmp_path)


@pytest.mark.parametrize(
    ("low", "high", "log", "expected"),
    [
        (0, 10, False, [0, 2, 4, 6, 8, 10]),
        (-0.1, 0.1, False, [-0.1, -0.05, 0.0, 0.05, 0.1]),
        (5, 5, False, [5]),
        (0.9, 1100, True, [1, 10, 100, 1000]),
        (0.1, 1.1, True, [0.1, 0.3, 1.0]),
    ],
)
def test_ticks(low: float, high: float, log: bool, expected: list[float]) -> None:
    assert ticks(low, high, log) == pytest.approx(expected)


def test_plots_take_any_numbers() -> None:
    assert bounds([float("nan"), float("inf")]) == (0.0, 1.0)
    assert bounds([2.0]) == pytest.approx((1.9, 2.1))
    low, high = bounds([1e-3, 1e3], log=True)
    assert low < 1e-3 < 1e3 < high
    plot = Plot((0, 1), (1, 2), "<x>", "y")
    plot.line([(0, 1), (0.5, float("nan")), (1, 2)], "#000", "<b>")
    text = str(plot.render())
    assert "nan" not in text
    assert "<b>" not in text
    assert "&lt;x&gt;" in text
    assert [shown(value) for value in (0, 0.00012, 1234.5, 2e7)] == [
        "0",
        "1.2e-4",
        "1,234",
        "2.0e7",
    ]
