"""A mix of two tasks from the config to the promoted model, as a user runs it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from raytune_ft.cli import run_command
from raytune_ft.config.load import load_config
from raytune_ft.data.prepared import open_prepared
from raytune_ft.model.load import resolve_model_path
from raytune_ft.train.setup import order_of

ROOT = Path(__file__).parents[2]
ROWS = ROOT / "jobs" / "data" / "tiny_instructions" / "train.jsonl"

pytestmark = [pytest.mark.e2e, pytest.mark.usefixtures("traced_once")]
CONFIG = """
name: mixed
storage: {tmp}/runs
data:
  train:
    - {{name: maths, path: {tmp}/maths.jsonl, prompt: instruction, completion: response, weight: 3}}
    - {{name: words, path: {tmp}/words.jsonl, prompt: instruction, completion: response, weight: 1}}
  validation: 0.25
  mixture: {{examples: shortest}}
  curriculum: {{by: base_loss, schedule: sort}}
train: {{batch_size: 4, epochs: 1, eval_every_examples: 20}}
"""


@pytest.fixture
def file(tmp_path: Path) -> Iterator[Path]:
    lines = ROWS.read_text().splitlines(keepends=True)
    (tmp_path / "maths.jsonl").write_text("".join(lines[:40]))
    (tmp_path / "words.jsonl").write_text("".join(lines[40:80]))
    config = tmp_path / "config.yaml"
    config.write_text(CONFIG.format(tmp=tmp_path))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield config
    torch.set_num_threads(threads)


def test_from_the_config_to_the_promoted_model(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(["plan", str(file)]) == 0
    assert (
        "a pass of 40 examples: maths 30 (1.00 epochs), words 10 (0.33 epochs)"
        in capsys.readouterr().out
    )
    assert run_command(["train", str(file)]) == 0
    shown = capsys.readouterr().out
    assert "the base's loss on 60 training examples" in shown
    assert "40/40 examples  eval_loss" in shown
    run = tmp_path / "runs" / "mixed"
    result = json.loads((run / "result.json").read_text())
    assert result["best"]["eval_loss_by_source"].keys() == {"maths", "words"}
    report = json.loads((run / "data.json").read_text())
    assert report["splits"]["validation"]["sources"] == {"maths": 10, "words": 10}

    _assert_sorted_by_a_loss_of_transformers(file, tmp_path, report["base_loss"])
    assert run_command(["train", str(file), "name=again", "train.max_examples=4"]) == 0
    assert "the base's loss" not in capsys.readouterr().out  # it is kept

    assert run_command(["promote", str(run)]) == 0
    evaluation = json.loads((run / "promoted" / "evaluation.json").read_text())
    assert {"eval_loss_maths", "eval_loss_words"} <= evaluation["promoted"].keys()
    best = evaluation["candidates"][0]["figures"]
    assert "eval_loss_maths" in best
    card = (run / "promoted" / "README.md").read_text()
    assert "| data.train.maths: maths.jsonl |" in card
    assert "| licence of data.train.words | not known |" in card
    page = (run / "report.html").read_text()
    assert "Loss on the validation examples of each source" in page
    assert "data.train.words sha256" in page


def _assert_sorted_by_a_loss_of_transformers(file: Path, tmp_path: Path, digest: str) -> None:
    """Hugging Face's own loss, example by example, and the order that comes of it."""
    folder = next((tmp_path / "runs" / ".cache" / "tokens").glob("*/base_loss.npy")).parent
    data = open_prepared(folder)
    assert data.report.base_loss == digest
    assert data.base_loss is not None
    model = AutoModelForCausalLM.from_pretrained(resolve_model_path("builtin:tiny"))
    expected = []
    for i in range(len(data.train)):
        ids, mask = (torch.from_numpy(np.array(each)) for each in data.train.example(i))
        targets = torch.where(mask, ids, -100)[1:]
        with torch.no_grad():
            logits = model(ids[None].long()).logits[0, :-1].float()
        expected.append(F.cross_entropy(logits, targets.long(), ignore_index=-100).item())
    assert np.abs(data.base_loss - np.array(expected)).max() < 1e-4
    order = order_of(load_config(file), data)
    found = order.indices(0, len(order))
    assert data.train.source_numbers is not None
    for source in (0, 1):
        own = data.base_loss[found[data.train.source_numbers[found] == source]]
        assert own.tolist() == sorted(own.tolist())


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.train.words.weight=1e-9", "data.train.words: weight=1e-09 comes to less than one"),
        ("data.train.words.weight=-1", "data.train.words.weight=-1 is not a number of at least 0"),
        ("data.train=[]", "data.train=[] names no source; write at least one"),
        ("data.train.words.path=gone.jsonl", "data.train.words.path="),
        ("data.train.words.prompt=question", "data.train.words.prompt=question is not a column"),
        ("data.curriculum={by: column, column: level}", "data.curriculum.column=level is not a"),
        ("data.mixture.temperature=0", "data.mixture.temperature=0 is not a number above 0"),
    ],
)
def test_bad_input(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], override: str, message: str
) -> None:
    assert run_command(["train", str(file), override]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "runs" / "mixed").exists()
