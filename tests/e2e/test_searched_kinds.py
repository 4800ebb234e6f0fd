"""Sweeps over what is no number: methods that do not fold, and mixes of sources."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from raytune_ft.config.load import load_config
from raytune_ft.data.prepared import open_prepared
from raytune_ft.model.load import resolve_model_path
from raytune_ft.train.setup import order_of
from tests.support.commands import command, run_process

ROOT = Path(__file__).parents[2]
PACKAGED = ROOT / "jobs" / "data" / "tiny_instructions"
COLUMNS = {"prompt": "instruction", "completion": "response"}
GRID: dict[str, Any] = {"sampler": "grid", "defaults": False, "scheduler": None}

pytestmark = [pytest.mark.e2e, pytest.mark.ray, pytest.mark.slow]


def sweep(folder: Path, **sections: Any) -> dict[str, Any]:
    """What the command leaves in `folder/runs/kinds`."""
    lines = (PACKAGED / "train.jsonl").read_text().splitlines(keepends=True)
    (folder / "some.jsonl").write_text("".join(lines[:200]))
    (folder / "others.jsonl").write_text("".join(lines[200:400]))
    plain = {
        "name": "kinds",
        "storage": str(folder / "runs"),
        "method": {"name": "lora", "rank": 4},
        "data": {
            "train": {"path": str(folder / "some.jsonl"), **COLUMNS},
            "validation": {"path": str(PACKAGED / "test.jsonl"), **COLUMNS},
        },
        "train": {
            "precision": "float32",
            "batch_size": 8,
            "max_examples": 160,
            "eval_every_examples": 80,
        },
        "promote": {"max_overlap": 1.0},
    }
    file = folder / "sweep.yaml"
    file.write_text(json.dumps(plain | sections))  # which YAML reads as well
    done = run_process(command("sweep", str(file)), 300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    result: dict[str, Any] = json.loads((folder / "runs/kinds/result.json").read_text())
    assert {row["status"] for row in result["trials"]} == {"completed"}
    return result


@pytest.mark.parametrize("names", [("lora", "prefix"), ("prompt", "p_tuning")])
def test_methods(names: tuple[str, str], tmp_path: Path) -> None:
    """Whichever wins is promoted as what it is: folded into a model, or as PEFT's adapter."""
    result = sweep(
        tmp_path,
        method={"name": names[0]},
        search={
            **GRID,
            "space": {
                "method.name": {"choice": list(names)},
                "train.lr": {"choice": [3e-3, 3e-2]},
            },
        },
    )
    tried = {(row["params"]["method.name"], row["params"]["train.lr"]) for row in result["trials"]}
    assert tried == {(name, lr) for name in names for lr in (3e-3, 3e-2)}
    best = min(result["trials"], key=lambda row: row["eval_loss"])
    assert result["best"]["trial"] == best["id"]
    assert result["execution"] == "isolated"
    promoted = tmp_path / "runs/kinds/promoted"
    if best["params"]["method.name"] == "lora":
        model: Any = AutoModelForCausalLM.from_pretrained(promoted / "model")
    else:
        base = AutoModelForCausalLM.from_pretrained(resolve_model_path("builtin:tiny"))
        model = PeftModel.from_pretrained(base, promoted / "adapter")
    assert torch.isfinite(model(input_ids=torch.tensor([[1, 2, 3]])).logits).all()
    evaluation = json.loads((promoted / "evaluation.json").read_text())
    measured = evaluation["promoted"]["eval_loss"]
    assert abs(measured - best["eval_loss"]) < 1e-4
    print(names, {row["id"]: (row["params"], row["eval_loss"]) for row in result["trials"]})


def test_mixes_and_curricula(tmp_path: Path) -> None:
    """Packed, each trial with an order of its own over the tokens that all share."""
    files = {name: str(tmp_path / f"{name}.jsonl") for name in ("some", "others")}
    shares = [0.05, 0.5]
    result = sweep(
        tmp_path,
        data={
            "train": [{"path": path, "weight": 0.5, **COLUMNS} for path in files.values()],
            "validation": 0.2,
            "curriculum": {"by": "length", "schedule": "linear"},
        },
        search={
            **GRID,
            "space": {
                "data.train.others.weight": {"choice": shares},
                "data.curriculum.start": {"choice": [0.1, 1.0]},
            },
        },
    )
    assert result["execution"] == "packed"
    assert len(result["trials"]) == 4
    run = tmp_path / "runs" / "kinds"
    data = open_prepared(next((run.parent / ".cache" / "tokens").iterdir()))
    assert data.train.source_numbers is not None
    seen = {}
    for row in result["trials"]:
        config = load_config(run / "trials" / row["id"] / "config.yaml")
        indices = order_of(config, data).indices(0, 160)
        share = float((data.train.source_numbers[indices] == 1).mean())
        written = row["params"]["data.train.others.weight"]
        assert abs(share - written / (0.5 + written)) < 0.02
        seen[written, row["params"]["data.curriculum.start"]] = indices
        assert row["eval_loss"] < result["base"]["eval_loss"]
    for share in shares:  # from short to long, or as they come
        lengths = {start: data.train.lengths[seen[share, start]] for start in (0.1, 1.0)}
        assert lengths[0.1][:40].mean() < lengths[0.1][-40:].mean() - 1
        assert not np.array_equal(lengths[0.1], lengths[1.0])
    evaluation = json.loads((run / "promoted" / "evaluation.json").read_text())
    assert {"eval_loss_some", "eval_loss_others"} <= evaluation["promoted"].keys()
    print({tuple(row["params"].values()): row["eval_loss"] for row in result["trials"]})
