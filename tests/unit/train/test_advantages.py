"""Which completions a step of GRPO is trained on, and with which advantages."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from raytune_ft.config.rollouts import GrpoConfig, RolloutConfig
from raytune_ft.model.objectives.policy import ADVANTAGE, COUNTED, IMPORTANCE, Grpo
from raytune_ft.model.sampling import Said
from raytune_ft.train.credit import advantages_of, same_of
from tests.support.rollouts import in_one_batch, train_config, weighed

NAN = float("nan")
SCALES = ("group", "batch", "none")


def said(groups: int, each: int, ended: Any = None) -> list[list[Said]]:
    """Completions of 1, 2, ... tokens."""
    ended = np.ones((groups, each), bool) if ended is None else np.asarray(ended)
    return [
        [Said((1,) * (1 + p * each + g), bool(ended[p, g])) for g in range(each)]
        for p in range(groups)
    ]


def made(totals: Any, ended: Any = None, scores: Any = None, **settings: Any) -> Any:
    """Split and advantages of a rollout with these sums of rewards."""
    groups, each = np.shape(totals)
    train = train_config(num_generations=each, **settings)
    return weighed(train, said(groups, each, ended), totals, scores=scores)


@pytest.mark.parametrize("scale", SCALES)
def test_advantages_of_a_group_sum_to_zero(scale: str) -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        totals = rng.normal(size=(5, 6)) * rng.choice([1e-3, 1.0, 1e4])
        totals[rng.random(totals.shape) < 0.3] = NAN
        found, taking = advantages_of(totals, scale)
        size = np.abs(found).max() + 1e-300
        assert np.abs(found.sum(1)).max() < 1e-9 * max(1.0, size)
        assert not found[np.isnan(totals)].any()
        counts = (~np.isnan(totals)).sum(1)
        assert (taking == (counts > 1)[:, None]).all()
        assert not found[counts < 2].any()
        best = np.where(np.isnan(totals), -np.inf, totals).argmax(1)
        rows = np.flatnonzero(counts > 1)
        assert (found[rows, best[rows]] >= 0).all()


def test_a_group_has_the_spread_that_its_rewards_have() -> None:
    """Of the sample, as in TRL: one reward in four is 1 makes 1.5 and -0.5 after division."""
    found, _ = advantages_of(np.array([[1.0, 0.0, 0.0, 0.0], [3.0, NAN, 5.0, NAN]]), "group")
    assert np.allclose(found[0], np.array([0.75, -0.25, -0.25, -0.25]) / (0.5 + 1e-4), rtol=1e-12)
    assert np.allclose(found[1, [0, 2]], np.array([-1.0, 1.0]) / (np.sqrt(2) + 1e-4), rtol=1e-12)


@pytest.mark.parametrize("scale", SCALES)
def test_rewards_that_are_all_the_same_teach_nothing(scale: str) -> None:
    totals = np.full((3, 4), 0.1)  # whose mean rounds to another number
    found, _ = advantages_of(totals, scale)
    assert np.abs(found).max() < 1e-11
    assert same_of(totals).all()


def test_one_scored_completion_is_no_group() -> None:
    """It cannot be compared, so that its group has no label tokens and counts in no denominator.
    TRL gives it the advantage 0 too, and counts its tokens.
    """
    split, found = made([[1.0, NAN, NAN], [1.0, 2.0, NAN], [NAN, NAN, NAN]], scale_rewards="none")
    assert found.tolist() == [[0, 0, 0], [-0.5, 0.5, 0], [0, 0, 0]]
    assert split.label_counts.tolist() == [0, 0, 0, 4, 5, 6, 0, 0, 0]
    assert split.columns[COUNTED][:, 0].tolist() == [0, 0, 0, 1, 1, 1, 0, 0, 0]


def test_groups_without_a_signal_are_dropped() -> None:
    totals = [[1.0, 1.0], [0.0, 1.0], [2.0, NAN]]
    kept, _ = made(totals)
    dropped, _ = made(totals, drop_zero_std=True)
    assert kept.label_counts.tolist() == [1, 2, 3, 4, 0, 0]
    assert dropped.label_counts.tolist() == [0, 0, 3, 4, 0, 0]
    assert dropped.columns[COUNTED][:, 0].tolist() == [0, 0, 1, 1, 0, 0]


def test_a_gate_closes_groups_that_it_does_not_tell_apart() -> None:
    """Whatever the sum of rewards says of them."""
    scores = {"right": [[0.0, 0.0], [0.0, 1.0], [None, 1.0], [None, None]]}
    totals = [[0.0, 0.3], [0.1, 1.2], [NAN, 1.0], [NAN, NAN]]
    split, found = made(totals, scores=scores, gate="right", scale_rewards="none")
    assert split.label_counts.tolist() == [0, 0, 3, 4, 0, 0, 0, 0]
    assert np.allclose(found, [[0, 0], [-0.55, 0.55], [0, 0], [0, 0]], rtol=1e-12)


def test_truncated_completions_are_compared_and_not_trained_on() -> None:
    """As in TRL: they keep their part in the mean of the group, and of grpo and dr_grpo in what
    the losses are divided by.
    """
    ended = [[True, False, True], [False, False, False]]
    totals = [[0.0, 3.0, 0.0], [1.0, 2.0, 3.0]]
    split, found = made(totals, ended, mask_truncated_completions=True, scale_rewards="none")
    assert found.tolist() == [[-1, 2, -1], [-1, 0, 1]]
    assert split.label_counts.tolist() == [1, 0, 3, 0, 0, 0]
    assert split.columns[ADVANTAGE][:, 0].tolist() == [-1, 2, -1, -1, 0, 1]
    indices, rollout = np.arange(6), RolloutConfig(max_completion_length=10)
    counts = {
        name: Grpo(settings=GrpoConfig(loss_type=name), rollout=rollout).count(split, indices)  # type: ignore[arg-type]
        for name in ("dapo", "cispo", "grpo", "dr_grpo")
    }
    assert counts == {"dapo": 4, "cispo": 4, "grpo": 6, "dr_grpo": 60}


def test_weights_of_prompts_weigh_losses_and_what_they_are_divided_by() -> None:
    train = train_config(num_generations=2)
    weights = np.array([0.0, 2.5])
    split, _ = weighed(train, said(2, 2), [[0.0, 1.0], [1.0, 0.0]], weights_P=weights)
    assert split.columns["weight"][:, 0].tolist() == [0, 0, 2.5, 2.5]
    rollout = RolloutConfig(max_completion_length=10)
    for name, count in {"dapo": 2.5 * 7, "grpo": 5.0, "dr_grpo": 50.0}.items():
        objective = Grpo(settings=GrpoConfig(loss_type=name), rollout=rollout)  # type: ignore[arg-type]
        assert objective.count(split, np.arange(4)) == count


def test_numbers_of_tokens_follow_what_is_left() -> None:
    """Old log-probabilities stay beside their tokens where completions before them are left out."""
    train = train_config(num_generations=2, num_iterations=2, drop_zero_std=True)
    split, _ = weighed(
        train, said(2, 2), [[1.0, 1.0], [0.0, 1.0]], logps=lambda split: -np.arange(10.0)
    )
    assert split.label_columns["sampled"].tolist() == [-3, -4, -5, -6, -7, -8, -9]
    assert split.label_counts.tolist() == [0, 0, 3, 4]


@pytest.mark.parametrize("most", [1.5, 3.0, None])
def test_what_vllm_sampled_is_weighed_by_the_ratio_to_it(most: float | None) -> None:
    """TRL's `token_truncate`: the loss of each token times min(exp(own - vLLM's), most)."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 6, (3, 4))
    spoken = [
        [Said((1,) * n, True, logps=tuple(rng.normal(-2, 1, n))) for n in row] for row in lengths
    ]
    totals = rng.normal(size=lengths.shape)
    own = rng.normal(-2, 1, lengths.sum())
    settings = {"num_generations": 4, "vllm_importance_sampling_clip_max": most}
    train = train_config(engine="vllm", **settings)
    split, _ = weighed(train, spoken, totals, logps=lambda of: own)
    theirs = np.concatenate([one.logps for group in spoken for one in group])
    ratio = np.exp(own - theirs)
    assert (ratio > 3).any()
    weights = np.ones_like(own) if most is None else np.minimum(ratio, most)
    assert (IMPORTANCE in split.label_columns) == (most is not None)
    logps_N = torch.tensor(own)
    alone, _ = weighed(train_config(**settings), spoken, totals, logps=lambda of: own)
    plain, found = (
        Grpo(settings=each.grpo, rollout=each.rollout).losses_of(logps_N, in_one_batch(of))
        for each, of in ((train_config(**settings), alone), (train, split))
    )
    assert IMPORTANCE not in alone.label_columns
    assert np.allclose(found.numpy(), plain.numpy() * weights, rtol=1e-12, atol=0)
