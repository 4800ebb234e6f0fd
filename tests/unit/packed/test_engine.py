"""A run that shares its base with others is the run that it would be alone."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from raytune_ft.config.schema import Config
from tests.support.models import true_float64
from tests.support.packed import RUNS, Packed, assert_untouched, beside_a_sick_run, run_packed
from tests.support.runs import (
    evaluations,
    largest_difference,
    make_config,
    run,
)

BOUNDS = {"float64": 1e-9, "float32": 1e-5}
LAYOUTS: list[dict[str, Any]] = [
    {"data.packing": True},
    {"data.packing": False, "train.micro_tokens": 100},
]


def _configs(inputs: tuple[Path, Path], shared: dict[str, Any], *names: str) -> dict[str, Config]:
    # Splits are drawn by the seed of the data, so that seeds differ in what is trained alone.
    data = {"data.validation": {"path": str(inputs[1])}}
    return {name: make_config(*inputs, {**data, **RUNS[name], **shared}) for name in names or RUNS}


class References:
    """Runs alone, in a directory for each precision; each is made once."""

    def __init__(self, inputs: tuple[Path, Path], root: Path) -> None:
        self._inputs, self._root = inputs, root

    def of(self, precision: str) -> Path:
        folder = self._root / precision
        if not folder.exists():
            for name, config in _configs(self._inputs, {"train.precision": precision}).items():
                assert run(config, folder / name).status == "completed"
        return folder


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory, inputs: tuple[Path, Path]) -> References:
    return References(inputs, tmp_path_factory.mktemp("references"))


@pytest.mark.parametrize(
    ("precision", "layout"),
    [
        pytest.param("float64", LAYOUTS[0], id="float64-rows-packed"),
        pytest.param("float64", LAYOUTS[1], id="float64-rows-padded"),
        pytest.param("float32", LAYOUTS[0], id="float32-rows-packed", marks=pytest.mark.slow),
        pytest.param("float32", LAYOUTS[1], id="float32-rows-padded"),
    ],
)
def test_as_alone(
    tmp_path: Path,
    inputs: tuple[Path, Path],
    references: References,
    precision: str,
    layout: dict[str, Any],
) -> None:
    with true_float64() if precision == "float64" else nullcontext():
        alone = references.of(precision)
        configs = _configs(inputs, {"train.precision": precision, **layout})
        ended = run_packed(configs, tmp_path, slots=3)
    assert ended[0] == "short"
    assert set(ended) == set(RUNS)
    for name in RUNS:
        differences = largest_difference(tmp_path / name, alone / name)
        assert max(differences) < BOUNDS[precision], (name, differences)
    assert len({evaluations(tmp_path / name)[0] for name in RUNS}) == 1  # the base's


@pytest.mark.slow
@pytest.mark.parametrize("names", [("short", "wide"), ("long", "wide")])
def test_bfloat16(tmp_path: Path, inputs: tuple[Path, Path], names: tuple[str, ...]) -> None:
    """Within twice of how far a run moves for being laid out otherwise."""
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
    optimizer, places = packed.engine.passes.optimizer, packed.engine.passes.stack.slices
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
    beside_a_sick_run(inputs, tmp_path, sickness)
    assert_untouched(tmp_path)
