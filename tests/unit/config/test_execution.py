"""Which sweeps are packed, and why others are not."""

from __future__ import annotations

from typing import Any

import pytest

from raytune_ft.config.execution import (
    arrange,
    choose_execution,
    packable,
)
from raytune_ft.config.schema import Config
from raytune_ft.config.search import Distribution
from raytune_ft.config.search_space import branches
from raytune_ft.errors import ConfigError
from raytune_ft.estimate.memory import steps_in_a_pass

LR = {"train.lr": {"log_uniform": [1e-4, 1e-2]}}


def config(space: dict[str, Any] | None = None, **sections: Any) -> Config:
    search = {"trials": 40, "space": LR | (space or {}), **sections.pop("search", {})}
    data = {"train": {"path": "rows.jsonl"}}
    return Config.model_validate({"name": "run", "data": data, "search": search, **sections})


@pytest.mark.parametrize(
    "space",
    [
        {},
        {"method.rank": {"choice": [4, 64]}, "train.batch_size": {"choice": [8, 16]}},
        {"method.targets": {"choice": ["all-linear", ["q_proj"]]}, "seed": {"choice": [1, 2]}},
        {"method.name": {"choice": ["lora"]}, "method.rslora": {"choice": [True, False]}},
    ],
)
@pytest.mark.parametrize("parallel", [{}, {"workers": 2}, {"workers": 2, "strategy": "fsdp"}])
def test_lora_trials_are_packed(space: dict[str, Any], parallel: dict[str, Any]) -> None:
    found = choose_execution(config(space, parallel=parallel))
    assert found == ("packed", "trials share one frozen base")


@pytest.mark.parametrize(
    ("space", "sections", "reason"),
    [
        ({}, {"method": {"name": "full"}}, "method.name=full trains the weights"),
        ({"method.name": {"choice": ["lora", "full"]}}, {}, "method.name=full trains the weights"),
        ({"method.dropout": {"uniform": [0.0, 0.1]}}, {}, "method.dropout=0.1 draws noise"),
        ({"method.dora": {"choice": [False, True]}}, {}, "method.dora=true"),
        ({"data.packing": {"choice": [True, False]}}, {}, "search.space.data.packing varies"),
        ({"train.precision": {"choice": ["float32"]}}, {}, "search.space.train.precision varies"),
        (
            {},
            {"parallel": {"workers": 2, "strategy": "deepspeed"}},
            "parallel.strategy=deepspeed shards trained weights",
        ),
    ],
)
def test_others_are_not(space: dict[str, Any], sections: dict[str, Any], reason: str) -> None:
    execution, why = choose_execution(config(space, **sections))
    assert execution == "isolated"
    assert why.startswith(reason)
    with pytest.raises(ConfigError, match=reason):
        choose_execution(config(space, search={"execution": "packed"}, **sections))


ROLLED: dict[str, Any] = {
    "data": {"train": {"path": "train.jsonl", "format": "prompt"}},
    "rewards": [{"name": "exact_match", "column": "answer"}],
}


@pytest.mark.parametrize(
    ("objective", "space", "reason"),
    [
        ("grpo", {"train.grpo.beta": {"choice": [0.0, 0.1]}}, "trials share one frozen base"),
        (
            "grpo",
            {"train.rollout.num_generations": {"choice": [4, 8]}},
            "trials share one frozen base",
        ),
        ("online_dpo", {"train.dpo.beta": {"choice": [0.1, 0.3]}}, "trials share one frozen base"),
        (
            "grpo",
            {"train.rollout.temperature": {"choice": [0.8, 1.0]}},
            "search.space.train.rollout.temperature varies what trials of one engine share",
        ),
        ("ppo", {}, "train.objective=ppo trains a critic, which packed runs lack"),
    ],
)
def test_trials_that_roll_out(objective: str, space: dict[str, Any], reason: str) -> None:
    execution, why = choose_execution(config(space, train={"objective": objective}, **ROLLED))
    assert (execution == "packed") == (reason == "trials share one frozen base")
    assert why == reason


def test_what_is_written_is_done() -> None:
    assert choose_execution(config(search={"execution": "isolated"}))[0] == "isolated"


@pytest.mark.parametrize(
    ("written", "fit", "trials", "fill_pass", "expected"),
    [
        ("auto", 2, 40, 20, (6, 2, 3)),
        ("auto", 1, 400, 20, (16, 1, 16)),
        ("auto", 1, 400, 9, (9, 1, 9)),
        ("auto", 1, 400, 1, (2, 1, 2)),
        ("auto", 2, 5, 20, (4, 2, 2)),
        ("auto", 4, 2, 20, (2, 2, 1)),
        (3, 2, 40, 1, (3, 2, 2)),
        (100, 1, 40, 20, (40, 1, 40)),
    ],
)
def test_slots_and_engines(
    written: Any, fit: int, trials: int, fill_pass: int, expected: tuple[int, int, int]
) -> None:
    space = {"method.rank": {"int_uniform": [4, 64]}}
    found = arrange(config(space, search={"max_concurrent": written}), fit, trials, fill_pass)
    assert (found.at_once, found.engines, found.slots) == expected
    assert (found.method.rank, found.measured) == (64, written == "auto")


@pytest.mark.parametrize(
    ("length", "workers", "expected"), [(12.5, 1, 10), (243.0, 1, 1), (100.0, 2, 2)]
)
def test_steps_that_fill_a_pass(length: float, workers: int, expected: int) -> None:
    """2048 tokens a worker on a CPU, 16 examples a step."""
    assert steps_in_a_pass(config(parallel={"workers": workers}), length) == expected


@pytest.mark.parametrize(
    ("method", "reason"),
    [
        ({"name": "freeze", "last": 1}, "method.name=freeze trains the weights"),
        ({"name": "ia3"}, "method.name=ia3 cannot be stacked"),
        ({"name": "qlora"}, "method.name=qlora cannot be stacked"),
        ({"init": "pissa"}, "method.init=pissa modifies the shared base"),
        ({"rank_pattern": {"q_proj": 2}}, "method.rank_pattern gives the layers"),
        ({"lr_ratio": 4.0}, "method.lr_ratio=4 gives one run two learning rates"),
        ({"init": "gaussian"}, None),
    ],
)
def test_methods_that_are_not_packed_say_why(method: dict[str, Any], reason: str | None) -> None:
    found = packable(
        Config.model_validate(
            {
                "name": "run",
                "method": {"name": "lora", **method},
                "data": {"train": {"path": "x.jsonl"}},
            }
        )
    )
    assert (found is None) if reason is None else (found or "").startswith(reason)


def test_methods_are_branches_of_a_space() -> None:
    space = {
        "method.name": {"choice": ["lora", "ia3", "freeze"]},
        "method.rank": {"choice": [8, 16]},
        "method.last": {"choice": [1, 2]},
    }
    tree = branches({key: Distribution.model_validate(line) for key, line in space.items()})
    assert tree.needs["method.rank"] == {"method.name": ("lora",)}
    assert tree.needs["method.last"] == {"method.name": ("freeze",)}
