"""`raytune-ft data`: what it prints, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from raytune_ft.cli import run_command


@pytest.fixture
def config(tmp_path: Path) -> list[str]:
    """A test split that repeats two prompts of train, and a bad row."""
    train = [{"prompt": f"ask {n}", "completion": "say " * (n + 1)} for n in range(40)]
    test = [{"prompt": f"ASK  {n}", "completion": "other"} for n in range(38, 48)]
    for name, rows in (("train", train), ("test", test)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with (tmp_path / "train.jsonl").open("a") as file:
        file.write('{"prompt": "x", "completion": 3}\n')
    text = (
        f"name: viewed\nstorage: {tmp_path / 'runs'}\nmodel: {{path: builtin:tiny}}\n"
        f"data:\n  train: {{path: {tmp_path / 'train.jsonl'}}}\n"
        f"  test: {{path: {tmp_path / 'test.jsonl'}}}\n  max_length: 64\n  max_bad_fraction: 0.1\n"
    )
    (tmp_path / "a.yaml").write_text(text)
    return [str(tmp_path / "a.yaml"), "promote.max_overlap=1"]


def test_check_counts_rows_causes_and_what_splits_share(
    config: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(["data", "check", *config]) == 0
    said = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "train train.jsonl 41 40 1" in said
    assert "train wrong_type train.jsonl:41: 'completion' is int" in said
    assert "train 38 " in said
    assert "train, test 0 2" in said


def test_check_refuses_what_train_would(
    config: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(["data", "check", config[0], "promote.max_overlap=0.1"]) == 2
    assert "shares 2 of its 10 prompts" in capsys.readouterr().err
    assert run_command(["data", "check", *config, "data.max_bad_fraction=0"]) == 2
    assert "has 1 unusable rows of 41" in capsys.readouterr().err


def test_stats_have_a_bar_for_each_range_of_lengths(
    config: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(["data", "stats", *config]) == 0
    said = capsys.readouterr().out
    counts = [int(line.split()[3]) for line in said.splitlines() if line.startswith("  ")]
    assert sum(counts) == 50
    assert "test: 10 examples of" in said
    cut = next(line for line in said.splitlines() if "data.max_length=64 cuts" in line)
    assert not cut.startswith("train: data.max_length=64 cuts 0 ")


def test_preview_marks_what_carries_loss(
    config: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(["data", "preview", *config, "--split", "test", "--count", "2"]) == 0
    said = capsys.readouterr().out
    assert "test 0\n<s>ASK  38\n[[other</s>]]" in said
    assert "test 1\n<s>ASK  39\n[[other</s>]]" in said
    for options, message in (
        (["--split", "dev"], "--split dev is not a split; write train, validation or test"),
        (["--start", "99"], "--start 99 is beyond the 38 examples of train"),
    ):
        assert run_command(["data", "preview", *config, *options]) == 2
        assert message in capsys.readouterr().err
