"""PPO where it is known in closed form."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor

from raytune_ft.config.rollouts import PpoConfig, RolloutConfig
from raytune_ft.config.train import TrainConfig
from raytune_ft.data.batch import MicroBatch
from raytune_ft.data.formats.prompt import Prompt
from raytune_ft.data.split import TokenizedSplit
from raytune_ft.model.critic import add_critic, critic_of
from raytune_ft.model.objectives.ppo import Ppo
from raytune_ft.model.sampling import Said
from raytune_ft.train.credit import TokenAdvantages
from raytune_ft.train.speaker import Answered, Speaker
from tests.support.differences import slopes
from tests.support.models import save_tiny_llama, true_float64
from tests.support.rollouts import PROMPT, in_one_batch

CLIPPED: dict[str, Any] = {"cliprange": 0.1, "cliprange_value": 0.1, "vf_coef": 0.7}


def objective(**settings: Any) -> Ppo:
    return Ppo(settings=PpoConfig(**settings), rollout=RolloutConfig(temperature=0.8))


def rolled_out(seed: int = 0) -> TokenizedSplit:
    """Completions of different lengths and weights, with label columns that are drawn."""
    rng = np.random.default_rng(seed)
    examples = []
    for length in (4, 1, 5, 2):
        ids = rng.integers(1, 90, 3 + length).astype(np.int32)
        examples.append((ids, np.arange(3 + length) >= 3))
    weights: Any = np.array([[0.0], [0.5], [1.0], [2.5]])
    drawn: dict[str, Any] = {
        "sampled": -4 - rng.random(12),
        "advantage": rng.normal(size=12),
        "value": rng.normal(size=12),
        "return": rng.normal(size=12),
    }
    split = TokenizedSplit.from_examples(examples, {"weight": weights})
    return TokenizedSplit(
        split.input_ids, split.label_mask, split.offsets, split.columns, label_columns=drawn
    )


def test_losses_are_clipped() -> None:
    """Each branch of both clips, by hand."""
    columns: dict[str, Any] = {
        "sampled": np.zeros(6),
        "advantage": np.array([1.0, 1.0, -1.0, -1.0, 0.0, 0.0]),
        "value": np.zeros(6),
        "return": np.array([0.0, 0.0, 0.0, 0.0, 1.0, -1.0]),
    }
    ids = np.arange(7, dtype=np.int32)
    split = TokenizedSplit.from_examples([(ids, ids > 0)])
    split = TokenizedSplit(split.input_ids, split.label_mask, split.offsets, label_columns=columns)
    ratio_N = torch.tensor([1.5, 0.5, 1.5, 0.5, 1.0, 1.0]).double()
    values_N = torch.tensor([0.0, 0.0, 0.0, 0.0, 0.5, 0.5]).double()
    made = objective(cliprange=0.2, cliprange_value=0.2, vf_coef=2.0)
    found_N = made.losses_of(ratio_N.log(), values_N, in_one_batch(split))
    # The larger loss counts: of a clipped value that is nearer to its return, the unclipped one.
    expected = [-1.2, -0.5, 1.5, 0.8, 0.8**2, 1.5**2]
    assert np.allclose(found_N.numpy(), expected, rtol=1e-12)
    free = objective(cliprange=0.2, cliprange_value=None, vf_coef=2.0)
    found_N = free.losses_of(ratio_N.log(), values_N, in_one_batch(split))
    assert np.allclose(found_N.numpy()[4:], [0.5**2, 1.5**2], rtol=1e-12)


def test_losses_are_divided_by_weighted_tokens() -> None:
    assert objective().count(rolled_out(), np.arange(4)) == 0.5 * 1 + 1.0 * 5 + 2.5 * 2
    assert objective().count(rolled_out(), np.array([2, 1])) == 5.5


@pytest.mark.parametrize("settings", [{}, CLIPPED, {"cliprange_value": None}])
def test_gradients_are_those_of_the_loss(settings: dict[str, Any]) -> None:
    made, split = objective(**settings), rolled_out()
    batch, rng = in_one_batch(split), np.random.default_rng(1)
    logps_N = batch.label_columns["sampled"] + 0.3 * torch.from_numpy(rng.normal(size=12))
    values_N = batch.label_columns["value"] + 0.3 * torch.from_numpy(rng.normal(size=12))
    assert torch.autograd.gradcheck(
        lambda logps, values: made.losses_of(logps, values, batch),
        (logps_N.requires_grad_(), values_N.requires_grad_()),
        eps=1e-6,
        rtol=1e-6,
        atol=1e-7,
    )


class Plain:
    """A model of transformers with a critic, whose logits are all there at the same time."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def with_values(self, batch: MicroBatch, of: Any) -> tuple[Tensor, Tensor]:
        """See `Forward.with_values`."""
        critic = critic_of(self.model)
        assert critic is not None
        with critic.reading(batch.labels_N):
            logits = self.model(batch.tokens_BS, attention_mask=batch.attention_BS).logits
        return of(logits.flatten(0, 1)[batch.labels_N], batch), critic.values_N


@pytest.mark.parametrize("settings", [{}, CLIPPED])
def test_gradients_reach_the_weights_of_a_model(tmp_path: Path, settings: dict[str, Any]) -> None:
    """Central differences of a step's loss along a direction in all weights, the critic's too."""
    from transformers import AutoModelForCausalLM

    made, split = objective(**settings), rolled_out()
    batch = in_one_batch(split)
    with true_float64():
        model = AutoModelForCausalLM.from_pretrained(save_tiny_llama(tmp_path)).double()
        add_critic(model, "float64", detached=False)
        weights = list(model.parameters())
        draws = torch.Generator().manual_seed(1)

        def drawn() -> list[Tensor]:
            return [torch.randn(w.shape, generator=draws, dtype=torch.float64) for w in weights]

        with torch.no_grad():  # a critic that says something, and ratios near 1
            model.value_head.weight.copy_(drawn()[-2])
            logps_N1, values_N = Plain(model).with_values(
                batch, lambda logits, _: (logits / 0.8).log_softmax(-1)
            )
            chosen_N = logps_N1.gather(1, batch.targets_N[:, None].long())[:, 0]
            noise_N = 0.2 * torch.randn(12, generator=draws, dtype=torch.float64)
            near = {"sampled": chosen_N + noise_N, "value": values_N + noise_N.flip(0)}
            batch = replace(batch, label_columns={**batch.label_columns, **near})

        def loss() -> Tensor:
            found_N = made.losses(cast(Any, Plain(model)), batch)
            return found_N.sum() / made.count(split, np.arange(4))

        slope, measured = slopes(loss, weights, drawn())
    print(f"{settings}: {slope:.8f}, by differences {measured:.8f}")
    assert abs(measured - slope) < 1e-6 * max(1.0, abs(slope))


ACTIONS, BETA = 3, 0.5


def paths(length: int) -> np.ndarray[Any, Any]:
    """`[ACTIONS ** length, length]`, every completion of that length."""
    return np.stack(np.unravel_index(np.arange(ACTIONS**length), (ACTIONS,) * length), 1)


def states(length: int) -> np.ndarray[Any, Any]:
    """`[completions * length]`, the number of the state in which each token is chosen."""
    found = paths(length)
    second = 1 + found[:, :1]
    return np.concatenate([np.zeros_like(second), second], 1)[:, :length].reshape(-1)


def joint(table: Tensor, length: int) -> Tensor:
    """The probability of each completion under a policy `[1 + ACTIONS, ACTIONS]`."""
    logps_N = chosen(table, length)
    return logps_N.view(-1, length).sum(1).exp()


def chosen(table: Tensor, length: int) -> Tensor:
    """The log-probability of each token of each completion."""
    tokens_N = torch.from_numpy(paths(length).reshape(-1))
    return table.log_softmax(-1)[torch.from_numpy(states(length)), tokens_N]


@pytest.mark.parametrize("whiten", [False, True])
@pytest.mark.parametrize("length", [1, 2])
def test_training_ends_at_the_regularised_optimum(length: int, whiten: bool) -> None:
    """p_ref exp(r / kl_coef) / Z over whole completions, of one token or of two. Every completion
    is there once, with its probability as its weight, so that nothing is left to chance.
    """
    rng = np.random.default_rng(0)
    rewards = 1.5 * rng.normal(size=ACTIONS**length)
    reference = torch.from_numpy(rng.normal(size=(1 + ACTIONS, ACTIONS)))
    aim = joint(reference, length).numpy() * np.exp(rewards / BETA)
    aim /= aim.sum()
    ppo = {"kl_coef": BETA, "whiten_advantages": whiten, "lam": 0.95, "vf_coef": 1.0}
    train = TrainConfig.model_validate({"objective": "ppo", "ppo": ppo})
    made = Ppo(settings=train.ppo, rollout=train.rollout)
    policy, values = reference.clone(), torch.zeros(1 + ACTIONS, dtype=torch.float64)
    prompts = [Prompt("", (PROMPT,), (), {}) for _ in rewards]
    said = [[Said(tuple(path), ended=True)] for path in paths(length).tolist()]
    answered = Answered(said, [[""]] * len(said), [[{}]] * len(said), rewards[:, None])
    places = torch.from_numpy(states(length))

    def known(split: TokenizedSplit, temperature: float) -> Any:
        return chosen(policy, length).numpy(), values[places].numpy()

    def before(split: TokenizedSplit, temperature: float) -> Any:
        return chosen(reference, length).numpy()

    speaker = cast(Speaker, SimpleNamespace(logps_and_values=known, base_logps=before))
    credit = TokenAdvantages(train, speaker)
    for number in range(400):
        weights = joint(policy, length).numpy()
        split = credit.assign(prompts, answered, weights).split
        batch, count = in_one_batch(split), made.count(split, np.arange(len(split)))
        # A whitened gradient does not get smaller, so that its steps have to.
        lr = 0.2 * length * (1 - number / 400 if whiten else 4.0)
        for _ in range(3):
            policy.requires_grad_()
            values.requires_grad_()
            losses_N = made.losses_of(chosen(policy, length), values[places], batch)
            own, critic = torch.autograd.grad(losses_N.sum() / count, (policy, values))
            policy = (policy - lr * own).detach()
            values = (values - 0.5 * length * critic).detach()
    distance = 0.5 * np.abs(joint(policy, length).numpy() - aim).sum()
    began = 0.5 * np.abs(joint(reference, length).numpy() - aim).sum()
    print(f"{length} tokens, whitened {whiten}: total variation {began:.3f} to {distance:.4f}")
    assert began > 0.3
    assert distance < 0.01
    # The critic ends at the value of the beginning, beta log Z.
    z = (joint(reference, length).numpy() * np.exp(rewards / BETA)).sum()
    assert abs(float(values[0]) - BETA * np.log(z)) < 0.02
