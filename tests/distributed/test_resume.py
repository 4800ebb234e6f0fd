"""A run that broke continues as if it had not, also under another layout."""

from __future__ import annotations

from pathlib import Path

import pytest

from raytune_ft.config.schema import Config
from tests.support.distributed import run_distributed
from tests.support.runs import (
    BrokenRun,
    Recorder,
    final_weights,
    largest_difference,
    losses,
    make_config,
    metrics,
    run,
)

# Each checkpoint is there when its step is over: a run that breaks leaves all of them behind.
CHANGES = {
    "train.max_examples": 7 * 20,
    "method.dropout": 0.0,
    "checkpoint.every_examples": 7 * 3,
    "checkpoint.asynchronous": False,
}


def _config(inputs: tuple[Path, Path], method: str) -> Config:
    return make_config(*inputs, CHANGES | {"method": {"name": method}})


def _break(inputs: tuple[Path, Path], run_dir: Path, method: str, step: int) -> None:
    with pytest.raises(BrokenRun):
        run(_config(inputs, method), run_dir, reporter=Recorder(fail_at=step))
    assert len(losses(run_dir)) == step  # it did break there, and was logged up to there


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, inputs: tuple[Path, Path]) -> Path:
    """A run of each method that nothing broke."""
    root = tmp_path_factory.mktemp("whole")
    for method in ("lora", "full"):
        run(_config(inputs, method), root / method)
    return root


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("step", [4, 11, 19])
def test_same_layout_is_bitwise(
    tmp_path: Path, inputs: tuple[Path, Path], whole: Path, method: str, step: int
) -> None:
    _break(inputs, tmp_path / "broken", method, step)
    result = run(_config(inputs, method), tmp_path / "broken", resumes=True)
    assert result.status == "completed"
    assert largest_difference(whole / method, tmp_path / "broken") == (0.0, 0.0, 0.0)
    assert [line["step"] for line in metrics(tmp_path / "broken")] == [
        line["step"] for line in metrics(whole / method)
    ]


def test_a_damaged_checkpoint_is_passed_over(
    tmp_path: Path, inputs: tuple[Path, Path], whole: Path
) -> None:
    _break(inputs, tmp_path / "broken", "lora", 17)
    checkpoints = sorted((tmp_path / "broken" / "checkpoints").glob("step-*"))
    assert len(checkpoints) >= 2
    weights = checkpoints[-1] / "state" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    run(_config(inputs, "lora"), tmp_path / "broken")
    assert largest_difference(whole / "lora", tmp_path / "broken") == (0.0, 0.0, 0.0)


def test_a_larger_budget_fills_the_partial_last_step(
    tmp_path: Path, inputs: tuple[Path, Path]
) -> None:
    """20 examples at batch 7 end with a step of 6; a run of 70 examples has a full one there."""
    constant = {"train.lr_schedule": "constant", "train.warmup_fraction": 0.0}
    long = make_config(*inputs, constant | {"train.max_examples": 70})
    run(long, tmp_path / "whole")
    run(make_config(*inputs, constant | {"train.max_examples": 20}), tmp_path / "raised")
    run(long, tmp_path / "raised")
    assert largest_difference(tmp_path / "whole", tmp_path / "raised") == (0.0, 0.0, 0.0)
    assert metrics(tmp_path / "raised")[-1]["examples"] == 70


def test_dropout_is_a_function_of_the_step(tmp_path: Path, inputs: tuple[Path, Path]) -> None:
    config = make_config(*inputs, CHANGES | {"method.dropout": 0.2})
    run(config, tmp_path / "whole")
    with pytest.raises(BrokenRun):
        run(config, tmp_path / "broken", reporter=Recorder(fail_at=12))
    run(config, tmp_path / "broken")
    assert largest_difference(tmp_path / "whole", tmp_path / "broken") == (0.0, 0.0, 0.0)
    run(make_config(*inputs, CHANGES), tmp_path / "without")
    assert largest_difference(tmp_path / "whole", tmp_path / "without")[0] > 1e-3


def _resume_both(inputs: tuple[Path, Path], root: Path, strategy: str) -> None:
    for method in ("lora", "full"):
        run(_config(inputs, method), root / method, strategy, resumes=True)


@pytest.mark.distributed
@pytest.mark.parametrize(("strategy", "world_size"), [("ddp", 2), ("fsdp", 2)])
def test_under_another_strategy(
    tmp_path: Path, inputs: tuple[Path, Path], whole: Path, strategy: str, world_size: int
) -> None:
    for method in ("lora", "full"):
        _break(inputs, tmp_path / "broken" / method, method, 11)
    run_distributed(_resume_both, world_size, inputs, tmp_path / "broken", strategy)
    for method in ("lora", "full"):
        differences = largest_difference(whole / method, tmp_path / "broken" / method)
        assert max(differences) < 1e-5, (method, differences)


# Every number of workers after every other one.
TOUR = (1, 2, 1, 3, 1, 4, 2, 3, 2, 4, 3, 4, 1)
CHAINS = [
    pytest.param(("fsdp", "ddp", "single"), (3, 2, 1), id="short"),
    pytest.param(("fsdp",) * len(TOUR), TOUR, id="fsdp", marks=pytest.mark.slow),
    pytest.param(("ddp", "fsdp") * len(TOUR), TOUR, id="both", marks=pytest.mark.slow),
]


def _stretch(
    inputs: tuple[Path, Path], root: Path, strategy: str, steps: int, resumes: bool
) -> None:
    """Up to so many steps: a budget that is raised again and again."""
    constant = {"train.lr_schedule": "constant", "train.warmup_fraction": 0.0}
    for method in ("lora", "full"):
        changes = constant | {"train.max_examples": 7 * steps, "method": {"name": method}}
        result = run(make_config(*inputs, changes), root / method, strategy, resumes=resumes)
        assert result.status == "completed", result.error


@pytest.mark.distributed
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("strategies", "workers"), CHAINS)
def test_saved_by_some_and_resumed_by_others(
    tmp_path: Path,
    inputs: tuple[Path, Path],
    strategies: tuple[str, ...],
    workers: tuple[int, ...],
) -> None:
    for number, (strategy, world_size) in enumerate(zip(strategies, workers, strict=False)):
        steps = 3 * (number + 1)
        run_distributed(
            _stretch, world_size, inputs, tmp_path / "chain", strategy, steps, number > 0
        )
    _stretch(inputs, tmp_path / "whole", "single", 3 * len(workers), resumes=False)
    for method in ("lora", "full"):
        chain, whole = tmp_path / "chain" / method, tmp_path / "whole" / method
        weights, expected = final_weights(chain), final_weights(whole)
        assert len(losses(chain)) == 3 * len(workers)
        assert max(abs(a - b) for a, b in zip(losses(chain), losses(whole), strict=True)) < 1e-5
        assert weights.keys() == expected.keys()
        assert all((weights[n] - expected[n]).abs().max() < 1e-5 for n in weights)
