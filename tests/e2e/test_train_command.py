"""`train`, `promote` and `evaluate` as a user runs them, in one process without Ray."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from raytune_ft.cli import run_command
from tests.support.models import save_tiny_llama

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.e2e


@pytest.fixture
def arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A run of a second: 80 rows, the packaged model, and enough of validation to tell."""
    monkeypatch.chdir(ROOT)
    rows = Path("jobs/data/tiny_instructions/train.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "train.jsonl").write_text("".join(rows[:80]))
    (tmp_path / "test.jsonl").write_text("".join(rows[80:120]))
    return [
        "jobs/quickstart.yaml",
        f"storage={tmp_path}/runs",
        "name=a",
        f"data.train.path={tmp_path}/train.jsonl",
        f"data.test.path={tmp_path}/test.jsonl",
        "data.validation=0.2",
        "train.epochs=null",
        "train.lr=1e-2",
        "train.lr_schedule=constant",  # so that a resume may raise the budget
        "train.eval_every_examples=40",
        "checkpoint.every_examples=40",
    ]


def test_train_resume_promote_evaluate(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "runs" / "a"

    assert run_command(["train", *arguments, "train.max_examples=80"]) == 0
    first = _read(run / "result.json")
    assert first["status"] == "completed"
    assert first["best"]["eval_loss"] < first["base"]["eval_loss"]
    assert (run / first["best"]["checkpoint"] / "manifest.json").is_file()
    assert "best eval loss" in capsys.readouterr().out
    lines = (run / "metrics.jsonl").read_text()
    assert "Nothing was promoted yet" in (run / "report.html").read_text()
    assert list((run / "tensorboard").iterdir())

    assert run_command(["train", *arguments, "train.max_examples=80", "--resume"]) == 0
    assert "is complete; nothing is left to do" in capsys.readouterr().out
    assert (run / "metrics.jsonl").read_text() == lines

    assert run_command(["train", *arguments, "train.max_examples=160", "--resume"]) == 0
    more = (run / "metrics.jsonl").read_text()
    assert more.startswith(lines)
    assert _read(run / "result.json")["final"]["examples"] == 160
    assert "train.max_examples" not in capsys.readouterr().err

    assert run_command(["promote", str(run)]) == 0
    measured = _read(run / "promoted" / "evaluation.json")
    assert measured["split"] == "test"
    assert measured["promoted"]["eval_loss"] < measured["base"]["eval_loss"]
    assert "is promoted: eval_loss" in (run / "report.html").read_text()
    capsys.readouterr()

    for model, column in ((str(run / "promoted" / "model"), "promoted"), ("builtin:tiny", "base")):
        config = ["--config", arguments[0], *arguments[1:]]
        assert run_command(["evaluate", model, *config]) == 0
        shown = dict(line.split() for line in capsys.readouterr().out.splitlines())
        assert shown["eval_loss"] == f"{measured[column]['eval_loss']:.4f}"


@pytest.mark.parametrize("too_long", ["truncate", "drop"])
def test_the_report_has_the_lengths_that_stats_prints(
    too_long: str, shared_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Problems of GSM8K, of which some are longer than `data.max_length`."""
    for name in ("train", "test"):
        lines = (shared_dir / f"data/gsm8k/{name}.jsonl").read_text().splitlines(keepends=True)
        (tmp_path / f"{name}.jsonl").write_text("".join(lines[:100]))
    config = [
        str(ROOT / "jobs/quickstart.yaml"),
        *(f"storage={tmp_path}/runs", "name=a", f"data.too_long={too_long}"),
        *(f"data.{name}.path={tmp_path}/{name}.jsonl" for name in ("train", "test")),
        *(f"data.{name}.prompt=question" for name in ("train", "test")),
        *(f"data.{name}.completion=answer" for name in ("train", "test")),
        *("data.max_length=150", "data.max_bad_fraction=0.5", "train.epochs=null"),
        *("train.max_examples=16", "search.scheduler=null"),
    ]
    assert run_command(["data", "stats", *config]) == 0
    said = capsys.readouterr().out
    name, bars = "", list[str]()
    for line in said.splitlines():
        if found := re.fullmatch(r" +([\d,]+) to +([\d,]+) +([\d,]+) +#*", line):
            low, high, count = found.groups()
            bars.append(f"{name}: {count} examples of {low} to {high} tokens")
        else:
            name = line.partition(":")[0]
    counts = re.findall(r"max_length=150 cuts (\d+) and drops (\d+) of 100 rows", said)
    cut, dropped = (sum(int(one) for one in each) for each in zip(*counts, strict=True))
    assert (cut > 20 and dropped == 0) if too_long == "truncate" else (cut == 0 and dropped > 20)

    assert run_command(["train", *config]) == 0
    page = (tmp_path / "runs" / "a" / "report.html").read_text()
    plots = json.loads(re.search(r'id="plots">(.*?)</script>', page, re.S)[1])  # type: ignore[index]
    titles = [(plot["layout"]["xaxis"].get("title") or {}).get("text") for plot in plots]
    drawn = plots[titles.index("tokens of an example")]
    assert [text for trace in drawn["data"] for text in trace["hovertext"]] == bars
    assert [trace["name"] for trace in drawn["data"]] == ["train", "validation", "test"]
    assert drawn["layout"]["shapes"][0]["x0"] == 150.5
    assert f"data.max_length=150 (dashed) cut {cut} rows and dropped {dropped}." in page


def test_rows_longer_than_the_model(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = save_tiny_llama(tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 16}))
    assert run_command(["train", *arguments, f"model.path={base}"]) == 2
    assert "but the model has 16 positions; write at most 16" in capsys.readouterr().err
    assert not (tmp_path / "runs" / "a").exists()


def test_a_model_directory_that_does_not_exist(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = ["--config", arguments[0], *arguments[1:]]
    assert run_command(["evaluate", f"{tmp_path}/nothing", *config]) == 2
    assert "nothing does not exist" in capsys.readouterr().err


def test_a_method_switch_on_the_command_line(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    switch = ["method.name=full", "train.lr=1e-3", "train.max_examples=40"]
    assert run_command(["train", *arguments, *switch]) == 0
    assert "method.name=full drops the file's method.rank, method.alpha" in capsys.readouterr().out
    best = _read(tmp_path / "runs" / "a" / "result.json")["best"]
    folder = tmp_path / "runs" / "a" / best["checkpoint"]
    assert (folder / "model.safetensors").is_file()
    assert not (folder / "adapter_config.json").exists()


def _read(path: Path) -> dict[str, Any]:
    content = json.loads(path.read_text())
    assert isinstance(content, dict)
    return content
