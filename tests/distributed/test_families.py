"""Every family of decoders under every strategy, method and activation policy.

`make test` runs a selection in which every two values of these meet; `make test-matrix` runs all
and writes the table to RAYTUNE_FT_MATRIX, where that is set.
"""

from __future__ import annotations

import os
from itertools import product
from pathlib import Path

import pytest

from tests.support.matrix import STRATEGIES, Case, Workshop, as_table, passed, run_group
from tests.support.models import FAMILIES
from tests.support.runs import losses

ACTIVATIONS = ("none", "selective", "full")
METHODS = ("lora", "full")
SELECTED = ("ddp 2", "fsdp 2", "zero-3 2")
MATRIX = [
    *((strategy, "none") for strategy in STRATEGIES),
    *product(("single", "ddp 2", "fsdp 2", "zero-3 2"), ("selective", "full")),
]
# What is known to differ, and why; a gap that has closed fails the matrix.
GAPS: dict[tuple[str, str, str, str], str] = {}


def _precisions(strategy: str) -> list[str]:
    """DeepSpeed has no float64."""
    return ["float32"] if strategy.startswith("zero") else ["float64", "float32"]


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("families"), float32_steps=12)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("strategy", SELECTED)
def test_selection(workshop: Workshop, strategy: str) -> None:
    shift = SELECTED.index(strategy)
    cases = [
        Case(
            strategy,
            ACTIVATIONS[(shift + number) % 3],
            METHODS[(shift + number) % 2],
            family,
            _precisions(strategy)[0],
        )
        for number, family in enumerate(FAMILIES)
    ]
    outcomes = run_group(workshop, cases)
    assert all(passed(case, outcome) for case, outcome in outcomes.items()), as_table(outcomes)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16(workshop: Workshop, family: str) -> None:
    """Every family trains in it, to about the same loss; `test_layouts` holds layouts to it."""
    workshop.prepare([Case("single", "none", "full", family, "bfloat16")])
    for activations, method in (("selective", "lora"), ("full", "full")):
        found = []
        for precision in ("float32", "bfloat16"):
            case = Case("single", activations, method, family, precision)
            run_dir = workshop.root / f"short-{case.name}"
            layout = {"parallel.activation_checkpointing": activations, "train.max_examples": 70}
            workshop.train(case, run_dir, "single", layout)
            found.append(losses(run_dir))
        wide, narrow = found
        assert narrow[-1] < narrow[0] - 0.2
        assert narrow == pytest.approx(wide, abs=0.05)


@pytest.mark.matrix
@pytest.mark.timeout(7200)
def test_matrix(tmp_path: Path) -> None:
    workshop = Workshop(tmp_path)
    outcomes: dict[Case, float | str] = {}
    for strategy, activations in MATRIX:
        cases = [
            Case(strategy, activations, method, family, precision)
            for method, family in product(METHODS, FAMILIES)
            for precision in _precisions(strategy)
        ]
        outcomes |= run_group(workshop, cases)
        table = as_table(outcomes)
        if path := os.environ.get("RAYTUNE_FT_MATRIX"):
            Path(path).write_text(table, encoding="utf-8")
    print("\n" + table)
    for case, outcome in outcomes.items():
        known = (case.strategy, case.activations, case.method, case.family) in GAPS
        assert passed(case, outcome) is not known, (case, outcome)
