"""What one run in one process does and leaves."""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from raytune_ft.checkpoints.store import CheckpointStore
from raytune_ft.errors import CheckpointError
from raytune_ft.model import meta as skeleton
from raytune_ft.model.load import build_model
from raytune_ft.records import StepMetrics
from raytune_ft.train import evaluation
from raytune_ft.train.report import Silent
from raytune_ft.train.stopping import Host
from tests.support.checkpoints import file_size_limit
from tests.support.models import VOCABULARY
from tests.support.runs import Recorder, losses, make_config, make_inputs, metrics, run

FULL = {"method": {"name": "full"}}
SHORT = {"train.max_examples": 70, "train.eval_every_examples": 25}


def _read_result(run_dir: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((run_dir / "result.json").read_text())
    return content


def test_files_of_a_run(tmp_path: Path, inputs: tuple[Path, Path]) -> None:
    recorder = Recorder()
    run(make_config(*inputs, SHORT), tmp_path / "run", reporter=recorder)
    lines = metrics(tmp_path / "run")
    evaluated = [line["step"] for line in lines if "eval_loss" in line]
    # 7 examples a step: the first steps at or past 25, 50, 75 are 4, 8; the last one is 10.
    assert evaluated == [0, 4, 8, 10]
    assert [line["examples"] for line in lines if "loss" in line] == list(range(7, 71, 7))
    result = _read_result(tmp_path / "run")
    assert result["status"] == "completed"
    assert result["base"]["eval_loss"] == lines[0]["eval_loss"]
    best = min((line for line in lines[1:] if "eval_loss" in line), key=lambda x: x["eval_loss"])
    assert result["best"]["step"] == best["step"]
    assert (tmp_path / "run" / result["best"]["checkpoint"] / "manifest.json").is_file()
    assert result["final"]["step"] == 10
    assert [point.step for point, _ in recorder.evaluations] == evaluated


def test_an_adapter_that_peft_reads(tmp_path: Path, inputs: tuple[Path, Path]) -> None:
    run(make_config(*inputs, SHORT), tmp_path / "run")
    checkpoint = tmp_path / "run" / "checkpoints" / "step-000010"
    base = AutoModelForCausalLM.from_pretrained(inputs[0])
    adapted = PeftModel.from_pretrained(base, str(checkpoint))
    saved = dict(adapted.named_parameters())
    assert any(value.abs().sum() > 0 for name, value in saved.items() if "lora_B" in name)
    assert not list(checkpoint.rglob("*.bin")) + list(checkpoint.rglob("*.pt"))


def test_a_full_model_that_transformers_reads(tmp_path: Path, inputs: tuple[Path, Path]) -> None:
    run(make_config(*inputs, SHORT | FULL), tmp_path / "run")
    checkpoint = tmp_path / "run" / "checkpoints" / "step-000010"
    before = AutoModelForCausalLM.from_pretrained(inputs[0]).state_dict()
    after = AutoModelForCausalLM.from_pretrained(checkpoint).state_dict()
    assert before.keys() == after.keys()
    assert all(not torch.equal(before[name], after[name]) for name in before)


def test_retention_keeps_the_best_and_the_last(tmp_path: Path, inputs: tuple[Path, Path]) -> None:
    changes = {"checkpoint.every_examples": 7, "train.eval_every_examples": 14, "train.lr": 1e-2}
    run(make_config(*inputs, changes), tmp_path / "run")
    kept = [manifest.step for _, manifest in CheckpointStore(tmp_path / "run/checkpoints").list()]
    best = _read_result(tmp_path / "run")["best"]["step"]
    assert set(kept) == {39, 40, best}


def test_early_stopping(tmp_path: Path, inputs: tuple[Path, Path]) -> None:
    changes = {
        "train.lr": 0.1,  # so high that evaluations soon get worse
        "train.eval_every_examples": 7,
        "train.early_stopping": {"patience": 2},
        "train.warmup_fraction": 0.0,
    }
    result = run(make_config(*inputs, changes), tmp_path / "run")
    assert result.status == "early_stopped"
    values = [line["eval_loss"] for line in metrics(tmp_path / "run") if "eval_loss" in line][1:]
    assert min(values[-2:]) >= min(values[:-2])
    assert result.best is not None
    assert result.best.step == len(values) - 2
    again = run(make_config(*inputs, changes), tmp_path / "run")
    assert (again.status, again.final) == (result.status, result.final)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_a_run_that_diverges_fails(tmp_path: Path, inputs: tuple[Path, Path]) -> None:
    changes = {"train.lr": 1e30, "train.max_grad_norm": None, "train.warmup_fraction": 0.0}
    result = run(make_config(*inputs, changes | FULL), tmp_path / "run")
    assert result.status == "failed"
    assert result.error is not None
    assert result.error.startswith("Diverged: step 2: ")
    assert "write a train.lr below 1e+30 and train.max_grad_norm=" in result.error
    left = _read_result(tmp_path / "run")
    assert left["status"] == "failed"
    assert left["best"] is None


def test_a_loss_before_any_update_is_not_blamed_on_the_learning_rate(tmp_path: Path) -> None:
    model, data = make_inputs(tmp_path / "inputs")
    rows = [json.loads(line) | {"weight": 3e38} for line in data.read_text().splitlines()]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    weighted = {"data.train.example_weight": "weight"}
    result = run(make_config(model, data, SHORT | weighted), tmp_path / "run")
    assert result.error is not None
    assert result.error.startswith("Diverged: step 0: evaluation loss inf; no update precedes it")
    assert "train.precision" in result.error


def test_a_checkpoint_of_another_rank_is_refused(tmp_path: Path, inputs: tuple[Path, Path]) -> None:
    run(make_config(*inputs, SHORT), tmp_path / "run")
    other = make_config(*inputs, SHORT | {"method.rank": 8})
    result = run(other, tmp_path / "run")
    assert result.status == "failed"
    assert CheckpointError.__name__ in (result.error or "")
    assert "shape" in (result.error or "")


def test_a_checkpoint_that_cannot_be_written_is_named(
    tmp_path: Path, inputs: tuple[Path, Path]
) -> None:
    with file_size_limit(60_000):
        result = run(make_config(*inputs, {**SHORT, **FULL}), tmp_path / "run")
    assert result.status == "failed"
    assert re.search("step-000004 could not be written: .*too large", result.error or "")


def test_a_padding_token_beyond_the_embeddings_is_not_used(tmp_path: Path) -> None:
    model, data = make_inputs(tmp_path)
    config = make_config(model, data, SHORT | {"data.packing": False})
    run(config, tmp_path / "before")
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    assert tokenizer.pad_token_id == VOCABULARY
    tokenizer.save_pretrained(model)
    run(config, tmp_path / "after")
    assert losses(tmp_path / "before") == pytest.approx(losses(tmp_path / "after"), abs=1e-6)


def test_weights_that_take_no_part_are_saved_all_the_same(
    tmp_path: Path, inputs: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the vision tower of a model that is trained on text."""

    def with_unused(*arguments: Any) -> Any:
        model = build_model(*arguments)
        model.unused = torch.nn.Parameter(torch.ones(3))
        return model

    monkeypatch.setattr(skeleton, "build_model", with_unused)
    result = run(make_config(*inputs, SHORT), tmp_path / "run")
    assert result.status == "completed"
    state = tmp_path / "run" / "checkpoints" / "step-000010" / "state"
    assert load_file(state / "optimizer.safetensors")["unused.exp_avg"].tolist() == [0, 0, 0]


class _SignalAt(Silent):
    def __init__(self, step: int) -> None:
        self._step = step

    def step(self, metrics: StepMetrics) -> None:
        if metrics.step == self._step:
            os.kill(os.getpid(), signal.SIGTERM)


def test_a_signal_ends_the_run_after_its_step(tmp_path: Path, inputs: tuple[Path, Path]) -> None:
    config = make_config(*inputs)
    before = signal.getsignal(signal.SIGTERM)
    result = run(config, tmp_path / "run", reporter=_SignalAt(13))
    assert signal.getsignal(signal.SIGTERM) is before
    assert result.status == "interrupted"
    assert len(losses(tmp_path / "run")) == 14  # asked for after step 13, seen within the next
    newest, _ = CheckpointStore(tmp_path / "run" / "checkpoints").list()[-1]
    assert newest.name == "step-000014"
    run(config, tmp_path / "run")
    run(config, tmp_path / "whole")
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


@pytest.mark.parametrize(
    ("host", "saved"),
    [
        (Host(should_stop=lambda: True), ["step-000001"]),
        (Host(should_leave=lambda: True), []),
    ],
)
def test_a_host_ends_the_run_after_its_step(
    host: Host, saved: list[str], tmp_path: Path, inputs: tuple[Path, Path]
) -> None:
    """Its host writes the result. One that leaves saves nothing, and is not evaluated, though an
    evaluation is due.
    """
    config = make_config(*inputs, {**SHORT, "train.eval_every_examples": 7})
    assert run(config, tmp_path / "run", host=host).status == "interrupted"
    store = CheckpointStore(tmp_path / "run" / "checkpoints")
    assert [path.name for path in store.paths()] == saved
    lines = metrics(tmp_path / "run")
    assert [line["step"] for line in lines if "loss" in line] == [1]
    assert [line["step"] for line in lines if "eval_loss" in line] == ([0, 1] if saved else [0])
    assert not (tmp_path / "run" / "result.json").exists()


def test_synchronous_and_asynchronous_saving_agree(
    tmp_path: Path, inputs: tuple[Path, Path]
) -> None:
    for asynchronous in (True, False):
        config = make_config(*inputs, SHORT | {"checkpoint.asynchronous": asynchronous})
        run(config, tmp_path / str(asynchronous))
    steps = [
        [path.name for path, _ in CheckpointStore(tmp_path / each / "checkpoints").list()]
        for each in ("True", "False")
    ]
    assert steps[0] == steps[1]


def test_blocks_do_not_change_an_evaluation(
    tmp_path: Path, inputs: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    run(make_config(*inputs, SHORT), tmp_path / "one")
    monkeypatch.setattr(evaluation, "BLOCK_EXAMPLES", 5)
    run(make_config(*inputs, SHORT), tmp_path / "many")
    for a, b in zip(metrics(tmp_path / "one"), metrics(tmp_path / "many"), strict=True):
        if "eval_loss" in a:
            assert a["eval_loss"] == pytest.approx(b["eval_loss"], abs=1e-6)
            assert a["eval_exact_match"] == b["eval_exact_match"]
