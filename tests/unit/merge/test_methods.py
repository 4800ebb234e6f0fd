"""The published formulae, written again in numpy's float64 on whole tensors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from raytune_ft.merge.methods import (
    DARE,
    DARE_TIES,
    LINEAR,
    SLERP,
    TASK_ARITHMETIC,
    TIES,
    Formula,
    MergeSettings,
    Position,
    measure_slerp,
    measure_ties,
)
from tests.support.merges import merge_tensors

FORMULAS = (LINEAR, TASK_ARITHMETIC, SLERP, TIES, DARE, DARE_TIES)
Array = np.ndarray[Any, np.dtype[np.float64]]


def drawn(count: int = 3, shape: tuple[int, ...] = (40, 30)) -> tuple[list[Tensor], Tensor]:
    torch.manual_seed(0)
    base = torch.randn(shape)
    return [base + 0.1 * torch.randn(shape) for _ in range(count)], base


def numbers(tensors: list[Tensor], base: Tensor) -> tuple[list[Array], Array]:
    return [t.double().numpy() for t in tensors], base.double().numpy()


def ties_by_the_paper(tensors: list[Array], base: Array, density: float, scale: float) -> Array:
    """Algorithm 1 of arXiv 2306.01708, loops and all."""
    kept = max(1, int(density * base.size))
    trimmed = []
    for tensor in tensors:
        delta = (tensor - base).ravel()
        order = np.argsort(-np.abs(delta), kind="stable")[:kept]
        only = np.zeros_like(delta)
        only[order] = delta[order]
        trimmed.append(only)
    merged = np.zeros(base.size)
    for place in range(base.size):
        values = [delta[place] for delta in trimmed]
        sign = 1.0 if sum(values) >= 0 else -1.0
        agreeing = [value for value in values if value and np.sign(value) == sign]
        merged[place] = np.mean(agreeing) if agreeing else 0.0
    return base + scale * merged.reshape(base.shape)


def close(found: Tensor, expected: Array) -> None:
    np.testing.assert_allclose(found.double().numpy(), expected, rtol=0, atol=1e-6)


def test_the_mean() -> None:
    tensors, base = drawn()
    close(merge_tensors(LINEAR, tensors, base), np.mean(numbers(tensors, base)[0], axis=0))
    weighted = merge_tensors(LINEAR, tensors, base, MergeSettings(weights=(1, 2, 5)))
    one, two, five = numbers(tensors, base)[0]
    close(weighted, (one + 2 * two + 5 * five) / 8)


def test_task_arithmetic() -> None:
    tensors, base = drawn()
    arrays, origin = numbers(tensors, base)
    total = sum((array - origin for array in arrays), np.zeros_like(origin))
    close(merge_tensors(TASK_ARITHMETIC, tensors, base), origin + 0.4 * total)
    scaled = merge_tensors(TASK_ARITHMETIC, tensors, base, MergeSettings(scale=1.5))
    close(scaled, origin + 1.5 * total)


@pytest.mark.parametrize("position", [0.0, 0.3, 1.0])
def test_slerp(position: float) -> None:
    torch.manual_seed(1)
    tensors = [torch.randn(20, 10), torch.randn(20, 10)]
    one, two = (t.double().numpy() for t in tensors)
    angle = np.arccos((one * two).sum() / np.linalg.norm(one) / np.linalg.norm(two))
    expected = np.sin((1 - position) * angle) * one + np.sin(position * angle) * two
    found = merge_tensors(SLERP, tensors, tensors[0], MergeSettings(position=position))
    close(found, expected / np.sin(angle))


def test_slerp_of_parallel_tensors_is_the_line() -> None:
    tensors = [torch.ones(4), 3 * torch.ones(4)]
    assert torch.equal(merge_tensors(SLERP, tensors, tensors[0]), 2 * torch.ones(4))
    assert torch.equal(merge_tensors(SLERP, [torch.zeros(3)] * 2, tensors[0]), torch.zeros(3))


@pytest.mark.parametrize("density", [0.05, 0.2, 0.71, 1.0])
def test_ties(density: float) -> None:
    tensors, base = drawn()
    arrays, origin = numbers(tensors, base)
    found = merge_tensors(TIES, tensors, base, MergeSettings(density=density, scale=0.7))
    close(found, ties_by_the_paper(arrays, origin, density, 0.7))


def test_the_threshold_of_ties_is_exact() -> None:
    generator = torch.Generator().manual_seed(3)
    for count in (1, 2, 17, 1000):
        delta = torch.randn(count, generator=generator) * 10 ** torch.randn(1).item()
        for density in (0.01, 0.33, 1.0):
            kept = max(1, int(density * count))
            expected = delta.abs().sort(descending=True).values[kept - 1].item()
            rows = [([part], torch.zeros_like(part)) for part in delta.split(7)]
            found = measure_ties(lambda rows=rows: rows, count, MergeSettings(density=density))
            assert found == (expected,)


def test_deltas_of_nothing_change_nothing() -> None:
    base = torch.randn(5, 4)
    for formula in FORMULAS:
        count = formula.most or 3
        merged = merge_tensors(formula, [base.clone() for _ in range(count)], base)
        torch.testing.assert_close(merged, base, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("formula", "other"), [(DARE, TASK_ARITHMETIC), (DARE_TIES, TIES)])
def test_dare_keeps_everything_at_density_1(formula: Formula, other: Formula) -> None:
    tensors, base = drawn()
    whole = merge_tensors(formula, tensors, base, MergeSettings(density=1.0))
    settings = MergeSettings(density=1.0)
    assert torch.equal(whole, merge_tensors(other, tensors, base, settings))


def test_dare_drops_at_random_and_is_right_on_average() -> None:
    base = torch.zeros(200, 300)
    tensors = [torch.full_like(base, 1.0)]
    settings = MergeSettings(density=0.3, scale=1.0, seed=5)
    found = merge_tensors(DARE, tensors, base, settings, "w")
    kept = found != 0
    assert torch.allclose(found[kept], torch.tensor(1 / 0.3))
    assert abs(kept.float().mean().item() - 0.3) < 0.01  # 60,000 draws: 5 standard deviations
    assert abs(found.mean().item() - 1) < 0.04
    assert torch.equal(found, merge_tensors(DARE, tensors, base, settings, "w"))
    for other in (MergeSettings(density=0.3, scale=1.0, seed=6), settings):
        name = "w" if other.seed == 6 else "v"
        agreement = (merge_tensors(DARE, tensors, base, other, name) != 0) == kept
        assert abs(agreement.float().mean().item() - 0.58) < 0.02  # as chance has it
    members = merge_tensors(DARE, [*tensors, -tensors[0]], base, settings, "w")
    assert (members != 0).any()  # every member drops its own


@pytest.mark.parametrize("found", FORMULAS, ids=lambda formula: formula.name)
def test_rows_at_a_time_are_the_whole(found: Formula) -> None:
    tensors, base = drawn(found.most or 3, (37, 11))
    settings = MergeSettings(seed=9)
    expected = merge_tensors(found, tensors, base, settings, "w")
    cuts = [(0, 1), (1, 14), (14, 15), (15, 37)]

    def rows() -> list[tuple[list[Tensor], Tensor]]:
        return [([t[a:b] for t in tensors], base[a:b]) for a, b in cuts]

    facts = found.measure(rows, base.numel(), settings) if found.measure else None
    parts = [
        found.combine(*held, settings, facts, Position("w", a * 11))
        for held, (a, _) in zip(rows(), cuts, strict=True)
    ]
    torch.testing.assert_close(torch.cat(parts), expected, rtol=0, atol=1e-6)
    assert measure_slerp(rows, 0, settings)[0] > 0
