"""report.html says what the files say, escapes what they hold, and never fails a run."""

from __future__ import annotations

import base64
import gzip
import hashlib
import html
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from raytune_ft.cli import run_command
from raytune_ft.errors import StorageError
from raytune_ft.report import write
from raytune_ft.report.write import try_report, write_report
from tests.support.reports import EVIL


class Page(HTMLParser):
    """Elements, the text outside scripts, and all addresses."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.words: list[str] = []
        self.addresses: list[str] = []
        self.labels: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [str(value) for name, value in attrs if name in ("src", "href")]
        self.labels += [str(value) for name, value in attrs if name == "aria-label"]
        assert not any(name.startswith("on") for name, _ in attrs)

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def plots_of(page: str) -> list[Any]:
    """plotly's figures, as the page holds them."""
    found = re.search(r'id="plots">(.*?)</script>', page, re.S)
    assert found
    return json.loads(found[1])


def test_only_the_pages_own_scripts_may_run(sweep_dir: Path) -> None:
    text = write_report(sweep_dir).read_text()
    policy = re.findall(r'<meta http-equiv="Content-Security-Policy" content="(.*?)">', text)
    assert len(policy) == 1
    assert text.index("Content-Security-Policy") < text.index("<style>") < text.index("<body>")
    rules = dict(rule.split(" ", 1) for rule in html.unescape(policy[0]).split("; "))
    assert (rules["default-src"], rules["base-uri"]) == ("'none'", "'none'")
    # A browser runs a script without a type; the others are data, one of them plotly, which the
    # page unpacks and runs.
    scripts = re.findall(r"<script>(.*?)</script>", text, re.S)
    packed = re.findall(r'id="plotly">(.*?)</script>', text, re.S)
    scripts += [gzip.decompress(base64.b64decode(each)).decode() for each in packed]
    assert len(scripts) == 2
    digests = [hashlib.sha256(script.encode()).digest() for script in scripts]
    hashes = {f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests}
    assert set(rules["script-src"].split()) == hashes


def test_the_page_of_a_sweep(sweep_dir: Path) -> None:
    path = write_report(sweep_dir)
    assert path == sweep_dir / "report.html"
    text = path.read_text()
    page = Page(text)
    said = " ".join(page.words)
    assert "trial-000 is promoted: eval_loss 3.0000 → 1.1000" in said
    change = "-1.9000 (95% interval -2.1000 to -1.7000)"
    assert f"Difference to the base {change}, on 40 examples" in said
    assert "uniform_soup has a better value than trial-000 there" in said
    for title in (
        "Learning curves",
        "Candidates",
        "Gain and retention",
        "WiSE-FT",
        "Rungs",
        "Time",
        "Parameters and eval_loss",
        "Importance of parameters",
        "Samples",
        "config.yaml",
    ):
        assert title in said, title
    assert len(plots_of(text)) == len(page.labels) == 8
    assert page.labels[0] == "Learning curves: eval_loss by examples"
    # One file: nothing is asked of a network, and plotly is in it, packed.
    assert page.addresses == []
    assert 1_000_000 < len(text) < 2_500_000
    # What is better beyond its interval is green, what is not has no colour.
    assert re.search(r'class="number up">-1\.9000<', text)
    assert re.search(r'class="number ">0\.5000<', text)
    assert re.search(r'class="number down">0\.5000<', text)


def test_a_promotion_on_a_few_examples(sweep_dir: Path) -> None:
    """They give no intervals."""
    path = sweep_dir / "promoted/evaluation.json"
    content = json.loads(path.read_text()) | {"improved": False}
    for row in [*content["candidates"], *content["differences"].values()]:
        row["interval"] = None
    path.write_text(json.dumps(content))
    said = " ".join(Page(write_report(sweep_dir).read_text()).words)
    assert "trial-000 is promoted, tied with the base on test" in said
    assert "95% interval too few examples" in said
    assert "uniform_soup has a better value than trial-000 there" in said
    assert "1.0000, too few examples" in said  # in the plot of candidates


def test_a_candidate_whose_figure_is_not_finite(sweep_dir: Path) -> None:
    path = sweep_dir / "promoted/evaluation.json"
    content = json.loads(path.read_text())
    content["candidates"][2] |= {
        **{"figures": {"eval_loss": None, "retention_kl": None}},
        **{"difference": None, "interval": None},
    }
    path.write_text(json.dumps(content))
    text = write_report(sweep_dir).read_text()
    said = " ".join(Page(text).words)
    assert "uniform_soup has a better value than trial-000 there" in said
    drawn = next(plot for plot in plots_of(text) if len(plot["data"]) == 4)
    assert drawn["data"][2]["text"] == ["not finite"]
    assert "WiSE-FT" not in said  # two finite points are no curve


def test_what_data_hold_is_text(sweep_dir: Path) -> None:
    text = write_report(sweep_dir).read_text()
    assert EVIL not in text
    assert "<img" not in text
    page = Page(text)
    assert page.tags.count("script") == 3  # the plots, plotly, and what draws them
    assert EVIL in "".join(page.words)  # shown, not run
    assert len(plots_of(text)) == 8


def test_a_run_alone(sweep_dir: Path) -> None:
    run = sweep_dir / "trials" / "trial-000"
    (run / "config.yaml").write_text("name: one\ndata: {train: {path: train.jsonl}}\n")
    best = {"step": 30, "examples": 300, "eval_loss": 1.0}
    result = {"status": "completed", "base": {"eval_loss": 3.0}, "best": best}
    (run / "result.json").write_text(json.dumps(result))
    text = write_report(run).read_text()
    assert "eval_loss 1.0000, base 3.0000 (validation)" in text
    assert "Nothing was promoted yet" in text
    (curve,) = plots_of(text)
    loss, evaluation = curve["data"]
    assert (loss["name"], loss["x"], loss["y"]) == ("training loss", [10], [2.5])
    assert (evaluation["name"], evaluation["y"]) == ("evaluation", [3.0, 1.0, 1.0, 1.0])
    # One that is still running, and has measured nothing yet, has no plot and no plotly.
    (run / "result.json").unlink()
    (run / "metrics.jsonl").unlink()
    text = write_report(run).read_text()
    assert "Still running" in text
    assert len(text) < 30_000


REWARDED = """
name: one
data: {train: {path: train.jsonl, format: prompt}}
train: {objective: grpo, watch: [witness]}
rewards: ["score.py:said", {name: "score.py:true", label: witness}]
"""


@pytest.mark.parametrize(
    ("trained", "witness", "error", "flagged"),
    [
        ([0.1, 0.5, 0.9], [0.5, 0.8, 0.6], 0.06, "at 0.8000 after step 10 and ended at 0.6000"),
        ([0.1, 0.5, 0.9], [0.5, 0.8, 0.7], 0.0, ""),  # it keeps more than half of what it gained
        ([0.1, 0.5, 0.9], [0.5, 0.5, 0.4], 0.03, "at 0.5000 after step 0 and ended at 0.4000"),
        ([0.1, 0.5, 0.9], [0.5, 0.5, 0.4], 0.04, ""),  # 0.1 is less than 2 x 0.04 x sqrt(2)
        ([0.1, 0.5, 0.9], [0.5, 0.8, 0.6], 0.08, ""),
        ([0.1, 0.5, 0.1], [0.5, 0.5, 0.4], 0.0, ""),  # both fell
        ([0.1, 0.5, 0.9], [0.5, 0.5, 0.5], 0.0, ""),
    ],
)
def test_a_watched_reward_that_falls_is_named(
    tmp_path: Path, trained: list[float], witness: list[float], error: float, flagged: str
) -> None:
    rows = [
        {"step": 10 * i, "examples": 80 * i, "eval_loss": -one, "eval_reward": one}
        | {"eval_reward:said": one, "eval_reward:witness": other}
        | {"eval_reward_error:witness": error}
        for i, (one, other) in enumerate(zip(trained, witness, strict=True))
    ]
    (tmp_path / "config.yaml").write_text(REWARDED)
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = {"status": "completed", "best": {"step": 20, "examples": 160, "eval_loss": -0.9}}
    (tmp_path / "result.json").write_text(json.dumps(result))
    text = html.unescape(write_report(tmp_path).read_text())
    assert ("while witness, which is only watched, was " in text) == bool(flagged)
    assert flagged in text


def test_a_sweep_without_a_result_is_still_running(sweep_dir: Path) -> None:
    (sweep_dir / "result.json").unlink()
    shutil.rmtree(sweep_dir / "promoted")
    text = write_report(sweep_dir).read_text()
    assert "Still running" in text
    assert "<td>trial-005</td><td>running</td>" in text
    assert len(plots_of(text)[0]["data"]) == 6


def test_an_error_is_printed(sweep_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: object) -> None:
        raise KeyError("figures")

    monkeypatch.setattr(write, "plots", broken)
    said: list[str] = []
    try_report(sweep_dir, said.append)
    assert said == ["report.html was not written: KeyError: 'figures'"]
    assert not (sweep_dir / "report.html").exists()


def test_the_same_facts_in_the_terminal(
    sweep_dir: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert run_command(["report", str(sweep_dir)]) == 0
    said = capsys.readouterr().out
    assert "trial-000 is promoted: eval_loss 3.0000 → 1.1000" in said
    for line in ("uniform_soup", "-2.1000 to -1.7000", "trial-000 *", "report.html"):
        assert line in said
    assert run_command(["report", str(tmp_path)]) == 2
    assert "holds no config.yaml of a run" in capsys.readouterr().err
    with pytest.raises(StorageError):
        write_report(tmp_path)
