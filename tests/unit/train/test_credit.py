"""What tokens are credited with: sums that are known, and what is left out."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from raytune_ft.config.rollouts import PpoConfig
from raytune_ft.config.train import TrainConfig
from raytune_ft.data.formats.prompt import Prompt
from raytune_ft.model.sampling import Said
from raytune_ft.train.credit import (
    Learnt,
    TokenAdvantages,
    explained_variance,
    gae,
    token_rewards,
    whitened,
)
from raytune_ft.train.speaker import Answered, Speaker

NAN = float("nan")
COUNTS = np.array([5, 1, 0, 7, 3])


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.8), (0.97, 1.0), (1.0, 0.0)])
def test_advantages_are_the_quadratic_sum(gamma: float, lam: float) -> None:
    """The sum over all later tokens of (gamma lam)^k times the error of the k-th."""
    rng = np.random.default_rng(0)
    rewards, values = rng.normal(size=(2, COUNTS.sum()))
    found = gae(rewards, values, COUNTS, gamma, lam)
    expected, start = [], 0
    for count in COUNTS:
        r = rewards[start : start + count]
        v = np.append(values[start : start + count], 0.0)
        errors = [r[t] + gamma * v[t + 1] - v[t] for t in range(count)]
        expected += [
            sum((gamma * lam) ** (k - t) * errors[k] for k in range(t, count)) for t in range(count)
        ]
        start += count
    assert np.allclose(found, expected, rtol=0, atol=1e-13)


def test_without_a_bootstrap_returns_are_what_comes() -> None:
    rewards = np.arange(1.0, 17.0)
    values = np.random.default_rng(0).normal(size=16)
    returns = gae(rewards, values, COUNTS, 1.0, 1.0) + values
    assert np.allclose(returns[:5], [15, 14, 12, 9, 5], rtol=1e-12)
    assert np.allclose(returns[5], 6, rtol=1e-12)


def test_by_default_every_token_is_credited_with_the_score() -> None:
    """Also while the critic, whose values begin at 0, knows nothing."""
    ppo, counts = PpoConfig(), np.array([256])
    rewards = token_rewards(np.array([1.0]), np.zeros(256), counts, ppo.kl_coef)
    assert np.array_equal(gae(rewards, np.zeros(256), counts, ppo.gamma, ppo.lam), np.ones(256))


def test_the_score_stands_on_the_last_token() -> None:
    drift = np.linspace(-1, 1, 16)
    found = token_rewards(np.array([1.0, 2.0, 9.0, 4.0, 5.0]), drift, COUNTS, 0.5)
    expected = -0.5 * drift
    for place, score in ((4, 1), (5, 2), (12, 4), (15, 5)):
        expected[place] += score
    assert np.allclose(found, expected, rtol=1e-15)


def test_whitening_goes_by_weights() -> None:
    values = np.random.default_rng(0).normal(3, 2, 16)
    weights = np.array([0.0, 0.5, 1.0, 2.5] * 4)
    found = whitened(values, weights)
    assert abs((weights * found).sum()) < 1e-12
    assert abs((weights * found**2).sum() / weights.sum() - 1) < 1e-7
    assert whitened(values, np.zeros(16)) is values


def test_what_a_critic_explains() -> None:
    returns, ones = np.array([1.0, 2.0, 4.0]), np.ones(3)
    assert explained_variance(returns + 5, returns, ones) == pytest.approx(1)
    assert explained_variance(0 * returns, returns, ones) == 0
    assert explained_variance(-returns, returns, ones) == pytest.approx(-3)
    assert np.isnan(explained_variance(returns, ones, ones))
    assert np.isnan(explained_variance(returns, returns, 0 * ones))


def credited(totals: Any, lengths: Any, weights: Any = None, **ppo: Any) -> Learnt:
    """With values 0.5, 1.5, ... and log ratios that are all 0.1."""
    said = [[Said((1,) * count, ended=True) for count in group] for group in lengths]
    count = int(np.sum(lengths))
    speaker = SimpleNamespace(
        logps_and_values=lambda split, temperature: (np.full(count, -1.0), 0.5 + np.arange(count)),
        base_logps=lambda split, temperature: np.full(count, -1.1),
    )
    train = TrainConfig.model_validate({"objective": "ppo", "ppo": ppo})
    prompts = [Prompt("", (0, 0), (), {}) for _ in said]
    answered = Answered(said, [[]], [[]], np.array(totals))
    return TokenAdvantages(train, cast(Speaker, speaker)).assign(prompts, answered, weights)


def test_completions_without_a_score_are_left_out() -> None:
    """Their tokens are no labels, and do not count in the mean of what is whitened."""
    lengths = [[2, 3], [1, 2]]
    learnt = credited([[1.0, NAN], [NAN, 2.0]], lengths)
    assert learnt.split.label_counts.tolist() == [2, 0, 0, 2]
    columns = learnt.split.label_columns
    assert columns["value"].tolist() == [0.5, 1.5, 6.5, 7.5]
    assert columns["value"].dtype == np.float64
    assert abs(columns["advantage"].mean()) < 1e-12
    assert learnt.advantages_PG[0, 1] == learnt.advantages_PG[1, 0] == 0
    assert learnt.advantages_PG[0, 0] == pytest.approx(columns["advantage"][:2].mean())
    assert learnt.figures["kl"] == pytest.approx(0.1 * 8 / 4)


def test_returns_are_advantages_and_values() -> None:
    learnt = credited([[1.0]], [[3]], whiten_advantages=False, gamma=0.9)
    columns = learnt.split.label_columns
    assert np.allclose(columns["return"] - columns["value"], columns["advantage"], atol=1e-15)
    assert columns["return"][-1] == pytest.approx(1.0 - 0.05 * 0.1)
    assert "kl" not in credited([[1.0]], [[3]], kl_coef=0.0).figures


def test_examples_of_weight_0_change_nothing() -> None:
    weights = np.array([1.0, 0.0])
    both = credited([[1.0], [50.0]], [[3], [3]], weights).split
    one = credited([[1.0]], [[3]]).split
    assert both.columns["weight"][:, 0].tolist() == [1, 0]
    assert np.allclose(both.label_columns["advantage"][:3], one.label_columns["advantage"])


@pytest.mark.parametrize(
    ("totals", "kl_coef", "teaches"),
    [
        ([[1.0], [1.0]], 0.0, False),
        ([[1.0], [NAN]], 0.0, False),
        ([[1.0], [2.0]], 0.0, True),
        ([[1.0], [1.0]], 0.1, True),
    ],
)
def test_what_teaches(totals: Any, kl_coef: float, teaches: bool) -> None:
    """One completion a prompt is enough where prompts differ."""
    train = TrainConfig.model_validate({"objective": "ppo", "ppo": {"kl_coef": kl_coef}})
    credit = TokenAdvantages(train, cast(Speaker, None))
    assert credit.teaches(np.array(totals)) == teaches
