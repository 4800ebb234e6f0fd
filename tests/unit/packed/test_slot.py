"""What a packed run leaves, how it ends, and that ordinary runs go on from it."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from peft import PeftModel
from transformers import AutoModelForCausalLM

from raytune_ft.checkpoints.store import CheckpointStore
from raytune_ft.config.execution import packable
from raytune_ft.config.schema import Config
from raytune_ft.errors import ConfigError, ModelError
from tests.support.models import save_tiny, true_float64
from tests.support.packed import Packed, run_packed
from tests.support.runs import (
    Recorder,
    largest_difference,
    losses,
    make_config,
    metrics,
    run,
    write_rows,
)

SHORT = {"train.max_examples": 70, "train.eval_every_examples": 25}


def _result(run_dir: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((run_dir / "result.json").read_text())
    return content


def _steps_kept(run_dir: Path) -> list[int]:
    return [manifest.step for _, manifest in CheckpointStore(run_dir / "checkpoints").list()]


def test_the_files_of_an_ordinary_run(tmp_path: Path, inputs: tuple[Path, Path]) -> None:
    config = make_config(*inputs, SHORT)
    run(config, tmp_path / "alone" / "a")
    run_packed({"a": config, "b": config}, tmp_path)
    ours, theirs = tmp_path / "a", tmp_path / "alone" / "a"
    for mine, other in zip(metrics(ours), metrics(theirs), strict=True):
        assert list(mine) == list(other)
        for key in set(mine) - {"wall_s", "tokens_per_s"}:
            assert mine[key] == pytest.approx(other[key], abs=1e-5)
    assert _steps_kept(ours) == _steps_kept(theirs)
    left, expected = _result(ours), _result(theirs)
    assert left.keys() == expected.keys()
    for key in ("status", "seed", "config_sha256", "error", "notes"):
        assert left[key] == expected[key]
    assert left["best"]["checkpoint"] == expected["best"]["checkpoint"]
    files = [
        {str(p.relative_to(each)) for p in each.rglob("*") if "step-000010" in p.parts}
        for each in (ours, theirs)
    ]
    assert files[0] == files[1]
    base = AutoModelForCausalLM.from_pretrained(inputs[0])
    PeftModel.from_pretrained(base, str(ours / "checkpoints" / "step-000010"))


@pytest.mark.parametrize("precision", ["float64", pytest.param("float32", marks=pytest.mark.slow)])
def test_resumed_by_an_ordinary_run_and_the_other_way(
    tmp_path: Path, inputs: tuple[Path, Path], precision: str
) -> None:
    bound = {"float64": 1e-9, "float32": 1e-5}[precision]
    changes = {"train.precision": precision, "train.max_examples": 140, "method.rank": 3}
    config = make_config(*inputs, changes)
    with true_float64() if precision == "float64" else nullcontext():
        run(config, tmp_path / "whole")
        _interrupted(config, tmp_path, "a")
        run(config, tmp_path / "a", resumes=True)

        with pytest.raises(RuntimeError, match="on purpose"):
            run(config, tmp_path / "b", reporter=_Breaks())
        run_packed({"b": config, "other": config}, tmp_path)

        _interrupted(config, tmp_path, "c")
        run_packed({"other2": config, "c": config}, tmp_path)
    for name in "abc":
        assert _result(tmp_path / name)["status"] == "completed"
        differences = largest_difference(tmp_path / name, tmp_path / "whole")
        assert max(differences) < bound, (name, differences)


class _Breaks(Recorder):
    def step(self, metrics: Any) -> None:
        if metrics.step == 13:
            raise RuntimeError("on purpose")


def _interrupted(config: Config, root: Path, name: str) -> None:
    """Some passes beside another run, then sent away in the middle of a step."""
    packed = Packed(config, root, slots=2)
    packed.enter(f"{name}-neighbour", config)
    packed.enter(name, config)
    while len(metrics(root / name)) < 9:
        packed.passes(1)
    packed.engine.leave(root / name, "interrupted")
    assert packed.engine.free == 1
    assert _result(root / name)["status"] == "interrupted"
    packed.engine.leave(root / f"{name}-neighbour", "pruned")
    assert _result(root / f"{name}-neighbour")["status"] == "pruned"
    assert packed.passes(1) == []
    packed.engine.close()


def test_a_completed_run_that_enters_again_ends_at_once(
    tmp_path: Path, inputs: tuple[Path, Path]
) -> None:
    config = make_config(*inputs, SHORT)
    run_packed({"a": config}, tmp_path)
    before = _result(tmp_path / "a")
    assert run_packed({"a": config}, tmp_path) == ["a"]
    after = _result(tmp_path / "a")
    assert (after["status"], after["best"]) == ("completed", before["best"])


def test_early_stopping(tmp_path: Path, inputs: tuple[Path, Path]) -> None:
    changes = {
        "train.eval_every_examples": 14,
        "train.early_stopping": {"patience": 2, "min_delta": 10.0},
    }
    run_packed({"a": make_config(*inputs, changes), "b": make_config(*inputs, SHORT)}, tmp_path)
    run(make_config(*inputs, changes), tmp_path / "alone")
    ours, theirs = _result(tmp_path / "a"), _result(tmp_path / "alone")
    assert ours["status"] == "early_stopped"
    assert ours["best"]["step"] == theirs["best"]["step"]
    assert ours["final"]["step"] == theirs["final"]["step"]


class _Looks(Recorder):
    """Asserts that what it is told of is there."""

    def __init__(self, run_dir: Path) -> None:
        super().__init__()
        self.run_dir = run_dir

    def evaluation(self, metrics: Any, checkpoint: str | None) -> None:
        super().evaluation(metrics, checkpoint)
        if checkpoint is not None:
            CheckpointStore(self.run_dir / "checkpoints").verify(self.run_dir / checkpoint)


def test_reports_of_checkpoints_that_are_committed(
    tmp_path: Path, inputs: tuple[Path, Path]
) -> None:
    config = make_config(*inputs, SHORT)
    packed = Packed(config, tmp_path, slots=2)
    heard = _Looks(tmp_path / "a")
    packed.enter("a", config, heard)
    packed.enter("b", config)
    packed.finish(2)
    assert [point.step for point, _ in heard.evaluations] == [0, 4, 8, 10]
    assert [metric.step for metric in heard.steps] == list(range(1, 11))
    assert heard.evaluations[1][1] == "checkpoints/step-000004"


def test_who_interrupts_a_run_finds_a_checkpoint(tmp_path: Path, inputs: tuple[Path, Path]) -> None:
    config = make_config(*inputs)
    packed = Packed(config, tmp_path, slots=1)
    packed.enter("a", config)
    a = tmp_path / "a"
    while len(losses(a)) < 5:
        packed.passes(1)
    packed.engine.leave(a, "interrupted")
    packed.engine.close()
    assert _result(a)["status"] == "interrupted"
    assert _steps_kept(a)[-1] == len(losses(a)) == 5


@pytest.mark.parametrize(
    ("method", "reason"),
    [
        ({"method": {"name": "full"}}, "method.name=full"),
        ({"method.dora": True}, "method.dora"),
        ({"method.dropout": 0.1}, "method.dropout=0.1"),
    ],
)
def test_what_cannot_be_packed(
    tmp_path: Path, inputs: tuple[Path, Path], method: dict[str, Any], reason: str
) -> None:
    refused = make_config(*inputs, method)
    assert (packable(refused) or "").startswith(reason)
    assert packable(make_config(*inputs)) is None
    packed = Packed(make_config(*inputs), tmp_path, slots=1)
    with pytest.raises(ConfigError, match=reason):
        packed.enter("a", refused)
    assert packed.engine.free == 1
    packed.engine.close()


def test_what_does_not_fit_here(tmp_path: Path, inputs: tuple[Path, Path]) -> None:
    packed = Packed(make_config(*inputs), tmp_path, slots=1, rank=4)
    with pytest.raises(ConfigError, match="rank=5 is above 4"):
        packed.enter("a", make_config(*inputs, {"method.rank": 5}))
    with pytest.raises(ConfigError, match="precision"):
        packed.enter("a", make_config(*inputs, {"train.precision": "bfloat16"}))
    with pytest.raises(ConfigError, match="lm_head"):
        packed.enter("a", make_config(*inputs, {"method.targets": ["lm_head"]}))
    with pytest.raises(ModelError, match="names no layer"):
        packed.enter("a", make_config(*inputs, {"method.targets": ["nothing"]}))
    packed.engine.close()


def test_a_checkpoint_of_another_rank_fails_that_run_alone(
    tmp_path: Path, inputs: tuple[Path, Path]
) -> None:
    run_packed({"a": make_config(*inputs, SHORT)}, tmp_path)
    other = make_config(*inputs, SHORT | {"method.rank": 8})
    run_packed({"b": make_config(*inputs, SHORT), "a": other}, tmp_path)
    assert "CheckpointError" in _result(tmp_path / "a")["error"]
    assert _result(tmp_path / "b")["status"] == "completed"


@pytest.mark.parametrize("family", ["gpt2", "phi3", "gemma3"])
def test_families(tmp_path: Path, family: str) -> None:
    """Transposed layers with biases, fused projections, windows; several targets by name."""
    model = save_tiny(family, tmp_path / "model")
    data = write_rows(tmp_path / "rows.jsonl", 60)
    configs = {
        str(rank): make_config(
            model, data, SHORT | {"method.rank": rank, "train.precision": "float32"}
        )
        for rank in (2, 5)
    }
    run_packed(configs, tmp_path / "packed")
    for name, config in configs.items():
        run(config, tmp_path / name)
        differences = largest_difference(tmp_path / name, tmp_path / "packed" / name)
        assert max(differences) < 1e-5, differences
