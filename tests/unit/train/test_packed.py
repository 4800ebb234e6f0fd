"""A run that shares its base with others is the run that it would be alone."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from raytune_ft.config.schema import Config
from tests.support.models import true_float64
from tests.support.packed import Packed, run_packed
from tests.support.runs import (
    evaluations,
    final_weights,
    largest_difference,
    losses,
    make_config,
    make_inputs,
    run,
)

BOUNDS = {"float64": 1e-9, "float32": 1e-5}
# Different in all that a run has of its own; the last one enters a slot that another has used.
RUNS: dict[str, dict[str, Any]] = {
    "short": {
        "method.rank": 8,
        "method.alpha": 8.0,
        "train.lr": 1e-3,
        "train.batch_size": 3,
        "train.max_examples": 50,
        "train.eval_every_examples": 20,
    },
    "long": {"train.max_examples": 50 * 7 - 3},
    "wide": {
        "method.rank": 2,
        "train.batch_size": 16,
        "train.lr_schedule": "linear",
        "train.weight_decay": 0.1,
        "train.max_grad_norm": 0.05,
        "train.max_examples": 16 * 9,
    },
    "late": {
        "seed": 3,
        "method.targets": ["q_proj", "down_proj"],
        "method.rslora": True,
        "train.lr_schedule": "constant",
        "train.max_grad_norm": None,
        "train.adam_beta1": 0.8,
        "train.adam_epsilon": 1e-6,
        "train.max_examples": 100,
    },
}
LAYOUTS: list[dict[str, Any]] = [
    {"data.packing": True},
    {"data.packing": False, "train.micro_tokens": 100},
]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_inputs(tmp_path_factory.mktemp("inputs"))


def _configs(inputs: tuple[Path, Path], shared: dict[str, Any], *names: str) -> dict[str, Config]:
    # Splits are drawn by the seed of the data, so that seeds differ in what is trained alone.
    data = {"data.validation": {"path": str(inputs[1])}}
    return {name: make_config(*inputs, {**data, **RUNS[name], **shared}) for name in names or RUNS}


@pytest.fixture(scope="module")
def references(
    tmp_path_factory: pytest.TempPathFactory, inputs: tuple[Path, Path]
) -> dict[str, Path]:
    """Each run alone; directories of them by precision."""
    root = tmp_path_factory.mktemp("references")
    for precision in BOUNDS:
        with true_float64() if precision == "float64" else nullcontext():
            for name, config in _configs(inputs, {"train.precision": precision}).items():
                assert run(config, root / precision / name).status == "completed"
    return {precision: root / precision for precision in BOUNDS}


@pytest.mark.parametrize("layout", LAYOUTS, ids=["rows-packed", "rows-padded"])
@pytest.mark.parametrize("precision", BOUNDS)
def test_as_alone(
    tmp_path: Path,
    inputs: tuple[Path, Path],
    references: dict[str, Path],
    precision: str,
    layout: dict[str, Any],
) -> None:
    with true_float64() if precision == "float64" else nullcontext():
        configs = _configs(inputs, {"train.precision": precision, **layout})
        ended = run_packed(configs, tmp_path, slots=3)
    assert ended[0] == "short"
    assert set(ended) == set(RUNS)
    for name in RUNS:
        differences = largest_difference(tmp_path / name, references[precision] / name)
        assert max(differences) < BOUNDS[precision], (name, differences)
    assert len({evaluations(tmp_path / name)[0] for name in RUNS}) == 1  # the base's


def test_bfloat16(tmp_path: Path, inputs: tuple[Path, Path]) -> None:
    """Within twice of how far a run moves for being laid out otherwise."""
    names = ("long", "wide")
    rows = [{"data.packing": False, "train.micro_tokens": 1}, {"data.packing": True}]
    for number, layout in enumerate(rows):
        shared = {"train.precision": "bfloat16", **layout}
        for name, config in _configs(inputs, shared, *names).items():
            run(config, tmp_path / str(number) / name)
    shared = {"train.precision": "bfloat16"}
    run_packed(_configs(inputs, shared, *names), tmp_path / "packed")
    for name in names:
        alone = tmp_path / "0" / name
        spread = max(largest_difference(tmp_path / "1" / name, alone)[:2])
        moved = max(largest_difference(tmp_path / "packed" / name, alone)[:2])
        assert 0 < spread < 0.05
        assert moved < 2 * spread, (name, moved, spread)


@pytest.mark.parametrize("activations", ["selective", "full"])
def test_activation_checkpointing_changes_nothing(
    tmp_path: Path, inputs: tuple[Path, Path], activations: str
) -> None:
    for kept in ("none", activations):
        shared = {"parallel.activation_checkpointing": kept, "train.max_examples": 45}
        run_packed(_configs(inputs, shared, "short", "wide"), tmp_path / kept)
    for name in ("short", "wide"):
        differences = largest_difference(tmp_path / "none" / name, tmp_path / activations / name)
        assert max(differences) < 1e-6


def test_numbers_beyond_a_rank_and_outside_targets_stay_zero(
    tmp_path: Path, inputs: tuple[Path, Path]
) -> None:
    configs = _configs(inputs, {"train.max_examples": 40}, "short", "wide", "late")
    packed = Packed(configs["short"], tmp_path, slots=3)
    for name, config in configs.items():
        packed.enter(name, config)
    packed.passes(4)
    optimizer, places = packed.engine._optimizer, packed.engine._stack.places
    ranks = [8, 2, 4]
    for rows_KN in (optimizer.numbers_KN, optimizer.exp_avg_KN, optimizer.exp_avg_sq_KN):
        for name, place in places.items():
            a_KRI, b_KRO = place.pair(rows_KN)
            for slot, rank in enumerate(ranks):
                trained = slot < 2 or name.rsplit(".", 1)[-1] in ("q_proj", "down_proj")
                assert not a_KRI[slot, rank if trained else 0 :].any()
                assert not b_KRO[slot, rank if trained else 0 :].any()
                assert not trained or b_KRO[slot, :rank].any()
    packed.finish(3)


@pytest.mark.parametrize("sickness", ["lr", "nan"])
def test_a_sick_slot_leaves_the_others_untouched_to_the_bit(
    tmp_path: Path, inputs: tuple[Path, Path], sickness: str
) -> None:
    """Against the same packing with a healthy run in its place, which leaves when it fails."""
    well = {"train.max_examples": 84, "train.eval_every_examples": 42}
    sick = well | ({"train.lr": 1e3, "train.max_grad_norm": None} if sickness == "lr" else {})
    failed_after = None
    for name, changes in (("sick", sick), ("well", well)):
        packed = Packed(make_config(*inputs, well), tmp_path / name, slots=3)
        for number, own in enumerate((well, changes, well)):
            packed.enter(str(number), make_config(*inputs, {**own, "method.rank": number + 2}))
        going, passes = {"0", "1", "2"}, 0
        while going:
            if (name, sickness, passes) == ("sick", "nan", 8):
                packed.engine._optimizer.numbers_KN[1] = torch.nan
            ended, passes = packed.passes(1), passes + 1
            going -= set(ended)
            if "1" in ended and len(going) == 2:
                failed_after = passes
            if name == "well" and passes == failed_after:
                packed.engine.leave(tmp_path / name / "1", "pruned")
                going -= {"1"}
        packed.engine.close()
    assert failed_after is not None
    assert '"failed"' in (tmp_path / "sick" / "1" / "result.json").read_text()
    for other in ("0", "2"):
        ours, theirs = tmp_path / "sick" / other, tmp_path / "well" / other
        assert losses(ours) == losses(theirs)
        assert evaluations(ours) == evaluations(theirs)
        weights = final_weights(theirs)
        assert all(torch.equal(value, weights[key]) for key, value in final_weights(ours).items())
