"""The largest passes, with the least checkpointing, that fit: against all of them, one by one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from raytune_ft.config.schema import Config
from raytune_ft.data.split import TokenizedSplit
from raytune_ft.estimate import memory
from raytune_ft.estimate.hardware import PROCESS
from raytune_ft.estimate.memory import MemoryModel, work_of
from raytune_ft.estimate.parameters import Shell, build_shell
from raytune_ft.estimate.passes import ENOUGH, LEAST, Passes, choose_passes, heaviest
from raytune_ft.format import GIB
from raytune_ft.model.checkpointing import POLICIES
from tests.support.runs import make_config
from tests.unit.plan.test_layouts import LLAMA_70B

pytestmark = pytest.mark.usefixtures("traced_once")
BUDGETS = [16384 >> power for power in range(7)]
ON_GPU = {"parallel.resources_per_worker": {"CPU": 1.0, "GPU": 1.0}, "parallel.strategy": "single"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of 8B without weights."""
    directory = tmp_path_factory.mktemp("llama-8b")
    sizes = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32}
    text = json.dumps(LLAMA_70B | sizes | {"intermediate_size": 14336})
    (directory / "config.json").write_text(text)
    return directory


def config_of(model: Path, changes: dict[str, Any] | None = None) -> Config:
    plain = ON_GPU | {"train.precision": "bfloat16", "train.batch_size": 64}
    return make_config(model, model / "rows.jsonl", plain | (changes or {}))


@pytest.fixture(scope="module")
def shell(model: Path) -> Shell:
    config = config_of(model)
    return build_shell(config.model, config.method, config.train.precision)


def split_of(longest: int = 700, count: int = 400) -> TokenizedSplit:
    lengths = np.random.default_rng(0).integers(100, 700, count)
    lengths[-1] = longest
    rows = [np.arange(length, dtype=np.int32) for length in lengths]
    return TokenizedSplit.from_examples([(row, row > len(row) // 2) for row in rows])


SPLIT = split_of()


@pytest.fixture(scope="module")
def needed(traced_once: None, model: Path, shell: Shell) -> dict[tuple[str, int], int]:
    """Bytes of each choice, from a model of memory of its own."""
    found = {}
    for budget in BUDGETS:
        config = config_of(model, {"train.micro_tokens": budget})
        work = work_of(config, SPLIT, 1, "cuda")
        traced = MemoryModel(shell, (1, 24), 700)
        for policy in POLICIES:
            layout = config.parallel.model_copy(update={"activation_checkpointing": policy})
            found[policy, budget] = traced.estimate(layout, work, "cuda").peak
    return found


def expected(needed: dict[tuple[str, int], int], usable: int) -> tuple[str, int]:
    """By the rule, over all choices."""
    fitting = {
        policy: max((b for b in BUDGETS if needed[policy, b] <= usable), default=0)
        for policy in POLICIES
    }
    enough = [policy for policy in POLICIES if fitting[policy] >= ENOUGH]
    policy = enough[0] if enough else max(POLICIES, key=lambda policy: fitting[policy])
    return policy, fitting[policy]


def near(left: int, right: int) -> bool:
    return abs(left - right) <= 0.03 * right


def test_the_choice_is_the_best_of_all_that_fit(
    model: Path, shell: Shell, needed: dict[tuple[str, int], int]
) -> None:
    seen = set()
    for usable in (200 * GIB, 90 * GIB, 60 * GIB, 40 * GIB, 30 * GIB, 22 * GIB, 19 * GIB):
        if any(near(usable, each) for each in needed.values()):
            continue  # the two models of memory interpolate between other rows
        found = choose_passes(config_of(model), shell, SPLIT, usable)
        assert (found.checkpointing, found.micro_tokens) == expected(needed, usable)
        assert found.fits
        assert found.needed <= usable
        seen.add((found.checkpointing, found.micro_tokens))
    assert ("none", 16384) in seen
    assert len({policy for policy, _ in seen}) > 1
    assert len({budget for _, budget in seen}) > 2


def test_where_nothing_fits_the_least_is_tried_and_said(model: Path, shell: Shell) -> None:
    found = choose_passes(config_of(model), shell, SPLIT, 8 * GIB)
    assert (found.checkpointing, found.fits) == ("full", False)
    assert found.work.rows == 1 or found.micro_tokens == LEAST
    assert "does not fit by the estimate, needs 1" in str(found)
    assert str(found).endswith("of a worker's 8.0 GiB")


def test_what_is_written_is_kept(model: Path, shell: Shell) -> None:
    def chosen(**changes: Any) -> Passes:
        dotted = {key.replace("__", "."): value for key, value in changes.items()}
        return choose_passes(config_of(model, dotted), shell, SPLIT, 30 * GIB)

    assert chosen(train__micro_tokens=16000).micro_tokens == 16000
    assert chosen(train__micro_tokens=16000).checkpointing != "none"
    small = chosen(parallel__activation_checkpointing="none")
    assert small.checkpointing == "none"
    assert small.micro_tokens < 16384
    both = chosen(train__micro_tokens=16000, parallel__activation_checkpointing="none")
    assert (both.micro_tokens, both.checkpointing, both.fits) == (16000, "none", False)


def test_unknown_memory_leaves_the_defaults(model: Path, shell: Shell) -> None:
    found = choose_passes(config_of(model), shell, SPLIT, None)
    assert (found.micro_tokens, found.checkpointing, found.fits) == (16384, "none", True)
    assert str(found).endswith("the memory of a worker is unknown")


def test_a_long_row_that_no_sampled_step_has_must_fit(model: Path, shell: Shell) -> None:
    """It stands alone in a pass, whatever `micro_tokens` is."""
    plain = choose_passes(config_of(model), shell, SPLIT, 200 * GIB)
    split = split_of(longest=40_000, count=40_000)
    assert choose_passes(config_of(model), shell, split, 200 * GIB).work.tokens >= 40_000
    assert plain.work.tokens <= 16384


def test_an_engine_keeps_room_for_its_adapters(model: Path, shell: Shell) -> None:
    """16 slots of six times their weights, or half of what the base leaves."""
    adapters = 16 * 6 * 4 * shell.trained
    alone, packed = (
        choose_passes(config_of(model), shell, SPLIT, 900 * GIB, packed=packed)
        for packed in (False, True)
    )
    assert packed.needed - alone.needed == adapters
    assert choose_passes(config_of(model), shell, SPLIT, alone.needed, packed=True) != alone
    base = alone.memory.parameters
    tight = choose_passes(config_of(model), shell, SPLIT, base + adapters, packed=True)
    assert tight.needed - tight.memory.peak == round(adapters / 2)


def test_an_elastic_run_must_fit_with_its_fewest_workers(model: Path) -> None:
    changes = {"parallel.strategy": "fsdp", "method": {"name": "full"}}
    ranges = ([2, 8], 2, 8)
    configs = [config_of(model, changes | {"parallel.workers": n}) for n in ranges]
    shell = build_shell(configs[0].model, configs[0].method, "bfloat16")
    elastic, two, eight = (choose_passes(c, shell, SPLIT, 500 * GIB).needed for c in configs)
    assert elastic == two > eight


def test_a_cpu_keeps_its_defaults_untraced_unless_memory_is_short(
    model: Path, shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    cpu = {"parallel.resources_per_worker": {"CPU": 1.0, "GPU": 0.0}}
    small = choose_passes(config_of(model, cpu), shell, SPLIT, 19 * GIB)
    assert small.needed > small.memory.peak == small.needed - PROCESS["cpu"]
    assert (small.micro_tokens, small.checkpointing) != (2048, "none")
    monkeypatch.setattr(memory, "trace", None)
    monkeypatch.setattr(memory, "trace_head", None)
    found = choose_passes(config_of(model, cpu), shell, SPLIT, 2000 * GIB)
    assert (found.micro_tokens, found.checkpointing, found.fits) == (2048, "none", True)


def test_the_heaviest_trials_of_a_space(model: Path) -> None:
    space = {
        "method.name": {"choice": ["lora", "full"]},
        "method.rank": {"choice": [4, 64], "when": {"method.name": "lora"}},
        "train.batch_size": {"choice": [8, 128, 32]},
        "train.precision": {"choice": ["bfloat16", "float32"]},
        "train.lr": {"log_uniform": [1e-5, 1e-3]},
    }
    search = {"trials": 4, "space": space}
    found = heaviest(config_of(model, {"search": search}))
    assert {each.train.batch_size for each in found} == {128}
    assert {each.train.precision for each in found} == {"float32"}
    ranks = [getattr(each.method, "rank", None) for each in found]
    assert sorted(str(rank) for rank in ranks) == ["4", "64", "None"]
    assert heaviest(config_of(model)) == [config_of(model)]
