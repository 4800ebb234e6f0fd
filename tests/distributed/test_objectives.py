"""Layout never changes the math, whatever is optimised: every objective against one process."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import pytest

from raytune_ft.config.objectives import OBJECTIVES
from tests.support.distributed import run_distributed
from tests.support.models import true_float64
from tests.support.objectives import CASES, config_of, save_inputs
from tests.support.packed import run_packed
from tests.support.runs import BrokenRun, Recorder, largest_difference, run

BOUND = 1e-9
BUDGET = {"train.max_examples": 7 * 6 - 3}
"""Six steps: the epoch ends in the fifth, where a second rollout begins; the last is short."""
KEPT = "kept kd"
"""Reads the teacher's logits from a file, and is held to the run whose teacher is in memory."""
RUNS = {
    **{name: (name, "decoder", "lora") for name in CASES},
    "encoder": ("classification", "encoder", "lora"),
    "full encoder": ("classification", "encoder", "full"),
    "frozen encoder": ("classification", "encoder", "freeze"),
    "full kd": ("kd", "decoder", "full"),
    "full grpo": ("grpo", "decoder", "full"),
    "full ppo": ("ppo", "decoder", "full"),
    KEPT: ("kd", "decoder", "lora"),
}

CARRYING = ("encoder", "kto", KEPT, "dpo", "grpo", "online_dpo", "ppo", "full ppo")
"""Each has something of its own to find again: a head, a reference, a file, completions, a critic.
The others resume as supervised training does in test_resume.py."""
SUMS = (*CARRYING, "classification", "reward", "grpo sequence")
"""Each sums over ranks in a way of its own; the others sum as one of these does. Their rows are
packed under fsdp.
"""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_inputs(tmp_path_factory.mktemp("inputs"))


class References:
    """One example after another in one process, each run when it is first asked for."""

    def __init__(self, root: Path, inputs: Path) -> None:
        self._root, self._inputs = root, inputs

    def of(self, name: str) -> Path:
        name = "kd" if name == KEPT else name
        if not (self._root / name / "result.json").is_file():
            _run_one(self._inputs, self._root, name, "single", False, 1)
        return self._root / name

    def compare(self, root: Path, names: Collection[str]) -> None:
        found = {name: largest_difference(root / name, self.of(name)) for name in names}
        assert all(max(each) < BOUND for each in found.values()), found


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory, inputs: Path) -> References:
    return References(tmp_path_factory.mktemp("references"), inputs)


def _run_all(
    inputs: Path,
    root: Path,
    names: Collection[str],
    strategy: str,
    packing: bool,
    micro_tokens: int,
    activations: str = "none",
) -> None:
    for name in names:
        _run_one(inputs, root, name, strategy, packing, micro_tokens, activations=activations)


def _run_one(
    inputs: Path,
    root: Path,
    name: str,
    strategy: str,
    packing: bool,
    micro_tokens: int,
    reporter: Recorder | None = None,
    resumes: bool = False,
    activations: str = "none",
) -> None:
    objective, model, method = RUNS[name]
    changes = {
        "train.precision": "float64",
        **BUDGET,
        "data.packing": packing,
        "train.micro_tokens": micro_tokens,
        "method": {"name": method} | ({"rank": 4} if method == "lora" else {}),
        "checkpoint.asynchronous": False,
        "parallel.activation_checkpointing": activations,
    }
    changes |= {"train.kd.cache": "disk"} if name == KEPT else {}
    with true_float64():
        result = run(
            config_of(inputs, objective, changes, model), root / name, strategy, reporter, resumes
        )
    assert result.status == "completed"


def test_every_objective_is_held_to_it() -> None:
    assert {objective.split()[0] for objective, _, _ in RUNS.values()} == set(OBJECTIVES)


@pytest.mark.slow  # a resumed run is packed at first
@pytest.mark.parametrize("name", RUNS)
def test_packed_rows(tmp_path: Path, inputs: Path, references: References, name: str) -> None:
    _run_one(inputs, tmp_path, name, "single", True, 96)
    references.compare(tmp_path, [name])


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("strategy", "names"),
    [
        ("fsdp", SUMS),
        pytest.param("fsdp", [*RUNS], marks=pytest.mark.slow),
        pytest.param("ddp", [*RUNS], marks=pytest.mark.slow),
    ],
    ids=["fsdp", "fsdp-all", "ddp-all"],
)
def test_two_processes(
    tmp_path: Path, inputs: Path, references: References, strategy: str, names: Collection[str]
) -> None:
    run_distributed(_run_all, 2, inputs, tmp_path, names, strategy, strategy == "fsdp", 96)
    references.compare(tmp_path, names)


@pytest.mark.slow
@pytest.mark.distributed
def test_three_processes_that_recompute(
    tmp_path: Path, inputs: Path, references: References
) -> None:
    run_distributed(_run_all, 3, inputs, tmp_path, [*RUNS], "ddp", True, 50, "full")
    references.compare(tmp_path, RUNS)


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_selective_recomputation(
    tmp_path: Path, inputs: Path, references: References, name: str
) -> None:
    _run_one(inputs, tmp_path, name, "single", False, 50, activations="selective")
    references.compare(tmp_path, [name])


@pytest.mark.parametrize(
    "name",
    [name if name in CARRYING else pytest.param(name, marks=pytest.mark.slow) for name in RUNS],
)
def test_a_resumed_run(tmp_path: Path, inputs: Path, references: References, name: str) -> None:
    """From the checkpoint of the third step, inside a rollout."""
    with pytest.raises(BrokenRun):
        _run_one(inputs, tmp_path, name, "single", True, 96, Recorder(fail_at=5))
    _run_one(inputs, tmp_path, name, "single", False, 50, resumes=True)
    references.compare(tmp_path, [name])


@pytest.mark.parametrize("name", ["sft", "clm", "rationale", "kd", KEPT, "dpo", "orpo", "simpo"])
def test_packed_runs(tmp_path: Path, inputs: Path, references: References, name: str) -> None:
    """Trials that share one base: the one of before, beside another; on pairs, beside one with
    another objective, then beside one with the same.
    """
    changes = {"train.precision": "float64", "checkpoint.asynchronous": False, **BUDGET}
    changes |= {"train.kd.cache": "disk"} if name == KEPT else {}
    objective, *_ = RUNS[name]
    configs = {
        name: config_of(inputs, objective, changes),
        "other": config_of(
            inputs,
            {"dpo": "simpo", "orpo": "simpo", "simpo": "orpo"}.get(objective, objective),
            {**changes, "train.lr": 1e-2, "method.rank": 2},
        ),
    }
    with true_float64():
        run_packed(configs, tmp_path)
    references.compare(tmp_path, [name])
    if OBJECTIVES[objective].pairs:
        configs["other"] = config_of(inputs, objective, {**changes, "train.lr": 1e-2})
        with true_float64():
            run_packed(configs, tmp_path / "alike")
        references.compare(tmp_path / "alike", [name])
