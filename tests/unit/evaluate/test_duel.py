"""Win rates from answers, against closed forms and generated truth."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy.optimize import minimize

from raytune_ft.evaluate.answers import Answers
from raytune_ft.evaluate.duel import PRIOR, Duels, controlled
from raytune_ft.evaluate.scores import Scores, difference
from raytune_ft.rewards.base import Group
from raytune_ft.rewards.pool import SharedRewards

NAN = float("nan")


def answers(texts: list[list[str]], scores: list[list[float]]) -> Answers:
    groups = [
        Group(f"r:{i}", "p", "", row, [[1] * len(text) for text in row])
        for i, row in enumerate(texts)
    ]
    tokens = np.array([[len(text) for text in row] for row in texts], np.float64)
    values = np.array(scores, np.float64)
    return Answers(tuple(groups), tokens, np.ones_like(tokens), {"r": values}, values)


def test_answers_that_no_reward_scores_alone_have_no_reward() -> None:
    scored = answers([["a"], ["bb"]], [[1.0], [NAN]])
    assert scored.figures()["reward"].value == 1
    assert scored.figures()["unscored"].value == 0.5
    alone = replace(scored, scores_PC={}, total_PC=np.full((2, 1), NAN))
    assert set(alone.figures()) == {"completion_tokens", "truncated"}


def duels(*metrics: str) -> Duels:
    return Duels(metrics, SharedRewards([]))


def test_a_win_is_one_a_tie_a_half_and_a_missing_score_no_comparison() -> None:
    base = answers([["a"], ["b"], ["c"], ["d"], ["e"]], [[1], [1], [1], [NAN], [1]])
    model = answers([["x"], ["y"], ["z"], ["w"], ["e"]], [[2], [0], [1], [9], [1 + 1e-7]])
    found = duels("win_rate:r", "loss").scores(base, model, print)
    assert set(found) == {"win_rate:r"}
    each = found["win_rate:r"].each
    assert each is not None
    # The same text ties, whatever rounding makes of its score.
    np.testing.assert_array_equal(each, [1, 0, 0.5, NAN, 0.5])
    assert found["win_rate:r"].value == 0.5
    own = duels("win_rate:r", "win_rate_lc:r").scores(base, base, print)
    assert [one.value for one in own.values()] == [0.5, 0.5]


def test_several_completions_are_compared_number_by_number() -> None:
    base = answers([["a", "b"], ["c", "d"]], [[1, 1], [1, NAN]])
    model = answers([["x", "y"], ["z", "w"]], [[2, 0], [2, 5]])
    each = duels("win_rate:r").scores(base, model, print)["win_rate:r"].each
    assert each is not None
    np.testing.assert_array_equal(each, [0.5, 1])


def test_missing_scores_are_left_out_in_pairs() -> None:
    rng = np.random.default_rng(0)
    first, second = rng.normal(0, 1, (2, 200))
    first[:20], second[10:40] = NAN, NAN
    a, b = Scores.known_mean(first), Scores.known_mean(second)
    assert a.value == pytest.approx(np.nanmean(first))
    both = ~np.isnan(first) & ~np.isnan(second)
    left, right = Scores.mean(first[both]), Scores.mean(second[both])
    found, expected = difference(a, b), difference(left, right)
    assert found == expected
    assert found.value == pytest.approx((second - first)[both].mean())


def truth(rng: np.random.Generator, n: int, a: float, b: float) -> tuple[np.ndarray, np.ndarray]:
    """Wins whose log-odds are a + b tanh(d / sd), where the model's completions are longer."""
    longer = rng.normal(30, 40, n).round()
    logit = a + b * np.tanh(longer / longer.std())
    return (rng.random(n) < 1 / (1 + np.exp(-logit))).astype(float), longer


def test_the_length_controlled_rate_is_that_of_generated_truth() -> None:
    rng = np.random.default_rng(1)
    won, longer = truth(rng, 200_000, -0.4, 1.5)
    expected = 1 / (1 + np.exp(0.4))
    assert controlled(won, longer).value == pytest.approx(expected, abs=0.005)
    assert won.mean() > 0.55  # the longer completions hide that the model is the worse one


def test_the_fit_is_the_maximum_of_the_likelihood_in_every_draw() -> None:
    rng = np.random.default_rng(4)
    won, longer = truth(rng, 60, 0.3, 0.8)
    won[:5], longer[7] = 0.5, 400
    counts = rng.multinomial(60, np.full(60, 1 / 60), 3).astype(float)
    found = controlled(won, longer)
    assert found.fit is not None
    for own, value in zip(counts, found.fit(found.columns, counts), strict=True):
        w, d = np.repeat(won, own.astype(int)), np.repeat(longer, own.astype(int))
        x = np.tanh(d / d.std())

        def loss(ab: np.ndarray, w: np.ndarray = w, x: np.ndarray = x) -> float:
            logit = ab[0] + ab[1] * x
            return float((np.logaddexp(0, logit) - w * logit).sum() + PRIOR * ab[1] ** 2 / 2)

        best = minimize(loss, np.zeros(2), tol=1e-12).x
        assert value == pytest.approx(1 / (1 + np.exp(-best[0])), abs=1e-6)


def test_its_interval_covers_the_truth() -> None:
    rng = np.random.default_rng(2)
    base = Scores.mean(np.full(150, 0.5))
    expected, covered = 1 / (1 + np.exp(0.5)) - 0.5, 0
    for trial in range(100):
        won, longer = truth(rng, 150, -0.5, 1.0)
        found = difference(base, controlled(won, longer), trial, draws=400)
        covered += found.low <= expected <= found.high
    assert 88 <= covered <= 100


@pytest.mark.parametrize(
    ("won", "longer", "expected"),
    [
        ([1] * 12, [0] * 12, 1.0),  # no length differs
        ([1, 0] * 6, [0] * 12, 0.5),
        ([1, 0] * 6, [9, -9] * 6, 0.5),  # the longer one always wins
        ([1] * 12, list(range(12)), 1.0),
        ([NAN] * 12, [0] * 12, NAN),
    ],
)
def test_where_data_decide_nothing(won: list[float], longer: list[float], expected: float) -> None:
    found = controlled(np.array(won, float), np.array(longer, float))
    assert found.value == pytest.approx(expected, abs=1e-3, nan_ok=True)
    assert np.isfinite(found.value) or np.isnan(expected)


def test_figures_of_answers() -> None:
    said = answers([["ab", "abcd"], ["a", "abc"]], [[1, NAN], [NAN, NAN]])
    figures = {name: one.value for name, one in said.figures().items()}
    assert figures == {
        "reward": 1.0,
        "reward:r": 1.0,
        "completion_tokens": 2.5,
        "truncated": 0.0,
        "unscored": 0.75,
    }
