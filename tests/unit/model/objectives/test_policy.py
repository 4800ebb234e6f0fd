"""Losses on rollouts: against TRL step by step, and where they are known in closed form."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor

from raytune_ft.config.schema import Config
from raytune_ft.config.train import TrainConfig
from raytune_ft.data.formats.prompt import Prompt
from raytune_ft.data.split import TokenizedSplit
from raytune_ft.model.objectives.policy import Grpo
from raytune_ft.model.objectives.preference import label_logps
from raytune_ft.model.sampling import Said
from raytune_ft.train.speaker import Answered, Speaker, Turn
from tests.support.differences import slopes
from tests.support.models import save_tiny_llama, true_float64
from tests.support.objectives import config_of, save_inputs
from tests.support.rollouts import Spoken, in_one_batch, step_loss, train_config, weighed
from tests.support.runs import final_weights, losses, run

STEPS, PROMPTS, EACH, LONGEST = 12, 4, 4, 10
COUNT = """
def vowels(completions, **columns):
    return [None if one[:1] in list("bcdfg") else sum(letter in "aeiou0123456789" for letter in one)
            for one in completions]
"""
"""Whole numbers, so that a mean over four of them is exact in TRL's float32; some are missing."""
EPSILON = 1e-5
"""Of Adam; a smaller one makes steps out of the rounding of gradients that are near 0."""
ROLLOUT: dict[str, Any] = {
    "num_generations": EACH,
    "max_completion_length": LONGEST,
    "temperature": 0.8,
}
CASES: dict[str, dict[str, Any]] = {
    "dapo": {},
    "grpo": {"loss_type": "grpo"},
    "dr_grpo": {"loss_type": "dr_grpo", "scale_rewards": "none"},
    "cispo": {"loss_type": "cispo", "epsilon_high": 5.0},
    "gspo": {"loss_type": "grpo", "importance_sampling_level": "sequence", "num_iterations": 2},
    "scale batch": {"scale_rewards": "batch"},
    "beta": {"beta": 0.2},
    "beta, ratio": {"beta": 0.2, "num_iterations": 2},
    "beta, sequence": {
        "beta": 0.2,
        "importance_sampling_level": "sequence",
        "loss_type": "grpo",
        "num_iterations": 2,
    },
    "truncated": {"mask_truncated_completions": True},
    "truncated grpo": {"mask_truncated_completions": True, "loss_type": "grpo"},
    "truncated dr_grpo": {"mask_truncated_completions": True, "loss_type": "dr_grpo"},
    "iterations": {"num_iterations": 2, "epsilon": 0.05},
    "iterations cispo": {"num_iterations": 3, "loss_type": "cispo", "epsilon_high": 1.05},
    "epsilon_high": {"num_iterations": 2, "epsilon": 0.02, "epsilon_high": 0.1},
    "delta": {"num_iterations": 3, "epsilon": 0.02, "delta": 1.05},
    "steps grpo": {"steps_per_generation": 2, "num_iterations": 2, "loss_type": "grpo"},
    "steps dr_grpo": {"steps_per_generation": 3, "num_iterations": 2, "loss_type": "dr_grpo"},
    "steps dapo": {"steps_per_generation": 2, "num_iterations": 2, "scale_rewards": "batch"},
    "steps cispo": {"steps_per_generation": 2, "loss_type": "cispo", "epsilon_high": 5.0},
}
QUICK = ("dapo", "beta, sequence", "steps dapo")
OF_ROLLOUT = ("num_iterations", "steps_per_generation")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = save_inputs(tmp_path_factory.mktemp("inputs"))
    (root / "count.py").write_text(COUNT)
    return root


def config_for(inputs: Path, settings: dict[str, Any]) -> Config:
    rollout = {key: value for key, value in settings.items() if key in OF_ROLLOUT}
    return config_of(
        inputs,
        "grpo",
        {
            "data.train.example_weight": None,
            "method": {"name": "full"},
            "rewards": [f"{inputs / 'count.py'}:vowels"],
            "train.batch_size": PROMPTS,
            "train.max_examples": STEPS * PROMPTS,
            "train.eval_every_examples": STEPS * PROMPTS,
            "train.lr": 1e-3,
            "train.adam_epsilon": EPSILON,
            "train.lr_schedule": "constant",
            "train.warmup_fraction": 0.0,
            "train.weight_decay": 0.0,
            "train.rollout": {**ROLLOUT, **rollout},
            "train.grpo": {k: v for k, v in settings.items() if k not in OF_ROLLOUT},
            "checkpoint.asynchronous": False,
        },
    )


Heard = list[tuple[list[Prompt], Answered]]


def heard_by(monkeypatch: pytest.MonkeyPatch) -> Heard:
    """What is said and scored in training from now on."""
    heard: Heard = []
    plain = Speaker.answer

    def answer(self: Speaker, turn: Turn) -> Answered:
        found = plain(self, turn)
        if not turn.evaluating:
            heard.append(([prompt for _, prompt in turn.prompts], found))
        return found

    monkeypatch.setattr(Speaker, "answer", answer)
    return heard


def fed_trainer(trl: Any, heard: Heard) -> Any:
    """TRL's trainer, which says and scores what was heard. Advantages, masks, log-probabilities,
    the loss and the optimizer are its own.
    """

    class Fed(trl.GRPOTrainer):  # type: ignore[misc]
        _rollout = -1

        def _generate(self, prompts: list[Any]) -> Any:
            self._rollout += 1
            asked, answered = heard[self._rollout]
            ids = [list(one.ids) for one in asked for _ in range(EACH)]
            said = [list(one.ids) for one in answered.flat]
            texts = [text for group in answered.texts for text in group]
            return ids, said, None, texts, None, {}, None, []

        def _calculate_rewards(self, *_: Any) -> Any:
            totals = heard[self._rollout][1].totals_PG
            return torch.tensor(totals.reshape(-1, 1), dtype=torch.float32)

        def _prepare_inputs(self, batch: Any) -> Any:
            """dapo and cispo of TRL divide by the mean number of tokens of the steps of a rollout,
            and ours by that of the step, as they do where a rollout is one step.
            """
            inputs = super()._prepare_inputs(batch)
            own = inputs["completion_mask"].sum() * self.args.steps_per_generation
            return {**inputs, "num_items_in_batch": own}

    return Fed


@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in CASES]
)
def test_grpo_is_trl(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    settings, heard = CASES[name], heard_by(monkeypatch)
    config = config_for(inputs, settings)
    assert run(config, tmp_path / "run").status == "completed"
    rollout = config.train.rollout
    assert len(heard) == STEPS // rollout.steps
    known = [(~np.isnan(answered.totals_PG)).sum(1) for _, answered in heard]
    assert min(counts.min() for counts in known) > 1
    assert min(counts.sum() for counts in known) < PROMPTS * EACH * rollout.steps_per_generation
    # TRL shuffles a rollout before it cuts it into steps.
    monkeypatch.setattr("trl.trainer.grpo_trainer.shuffle_sequence_dict", lambda batch: batch)
    load = partial(AutoModelForCausalLM.from_pretrained, inputs / "decoder", dtype=torch.float32)
    trainer = fed_trainer(trl, heard)(
        model=load(),
        reward_funcs=lambda **_: [],
        args=trl.GRPOConfig(
            output_dir=str(tmp_path / "trl"),
            per_device_train_batch_size=PROMPTS * EACH,
            gradient_accumulation_steps=1,
            max_steps=STEPS,
            learning_rate=1e-3,
            adam_epsilon=EPSILON,
            lr_scheduler_type="constant",
            bf16=False,
            gradient_checkpointing=False,
            use_cpu=True,
            logging_steps=1,
            logging_nan_inf_filter=False,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            seed=0,
            **{"steps_per_generation": 1, **ROLLOUT, **settings},
        ),
        train_dataset=datasets.Dataset.from_list([{"prompt": str(n)} for n in range(64)]),
        processing_class=AutoTokenizer.from_pretrained(inputs / "decoder"),
    )
    trainer.train()
    theirs = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    worst = max(abs(a - b) for a, b in zip(losses(tmp_path / "run"), theirs, strict=True))
    own = dict(trainer.model.named_parameters())
    apart = max(
        float((weight.double() - own[key].detach().double()).abs().max())
        for key, weight in final_weights(tmp_path / "run").items()
        if key in own
    )
    largest = max(map(abs, theirs))
    print(f"| {name} | {worst:.1e} | {apart:.1e} | {largest:.2g} |")
    assert worst < 1e-5
    assert apart < 1e-5


COUNTS = np.array([3, 1, 5, 2, 9, 4])
"""How often each of the actions is taken; their shares are the policy, without rounding."""
REWARDS = np.array([0.3, -1.0, 0.1, 2.0, 0.0, 1.2])
REFERENCE = np.array([0.1, 0.3, 0.05, 0.2, 0.25, 0.1])
SAME = {
    "dapo": {},
    "grpo": {"loss_type": "grpo"},
    "dr_grpo": {"loss_type": "dr_grpo"},
    "cispo": {"loss_type": "cispo", "epsilon_high": 5.0},
    "gspo": {"loss_type": "grpo", "importance_sampling_level": "sequence"},
    "clipped from both sides": {"delta": 2.0, "epsilon_high": 0.3},
    "old log-probabilities": {"num_iterations": 2},
}


def taken(counts: Any, length: int = 1) -> list[list[Said]]:
    """One group: each action, or each pair of actions, as often as `counts` says."""
    return [
        [
            Said(tuple(int(each) for each in action), ended=False)
            for action, times in np.ndenumerate(np.asarray(counts))
            for _ in range(times)
        ]
    ]


def gradient(
    train: TrainConfig, said: list[list[Said]], totals: Any, logits: Tensor, base: Any = None
) -> Tensor:
    """Of the loss of one group, on logits `[V]`, the same at every place."""
    own = logits.detach().clone().requires_grad_()
    logps = (own / train.rollout.temperature).log_softmax(-1)

    def of(logps_V: Any) -> Any:
        return lambda split: np.asarray(logps_V)[split.input_ids[split.label_mask]]

    known = logps.detach().numpy()
    split, _ = weighed(train, said, totals, logps=of(known), base=of(base))
    loss = step_loss(train, split, own.expand(int(split.label_mask.sum()), -1))
    (found,) = torch.autograd.grad(loss, own)
    return found


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("name", SAME)
def test_a_bandit_climbs_its_mean_reward(name: str, temperature: float) -> None:
    """Where a completion is one token and each is there as often as the policy has it, the
    gradient is that of the mean reward, p (r - p.r), whatever the loss.
    """
    train = train_config(
        scale_rewards="none",
        num_generations=int(COUNTS.sum()),
        max_completion_length=1,
        temperature=temperature,
        **SAME[name],
    )
    shares = COUNTS / COUNTS.sum()
    logits = temperature * torch.tensor(np.log(shares) + 0.7)
    found = gradient(train, taken(COUNTS), [np.repeat(REWARDS, COUNTS)], logits)
    right = shares * (REWARDS - shares @ REWARDS) / temperature
    assert np.abs(found.numpy() + right).max() < 1e-12


@pytest.mark.parametrize("kl", ["loss", "reward"])
def test_the_penalty_pulls_as_the_divergence_does(kl: str) -> None:
    """With equal rewards, what is left is beta times the gradient of KL(policy || reference)."""
    beta = 0.3
    train = train_config(scale_rewards="none", num_generations=int(COUNTS.sum()), beta=beta, kl=kl)
    shares = COUNTS / COUNTS.sum()
    ahead = np.log(shares / REFERENCE)
    right = beta * shares * (ahead - shares @ ahead)
    logits = torch.tensor(np.log(shares))
    totals = [np.full(COUNTS.sum(), 0.5)]
    found = gradient(train, taken(COUNTS), totals, logits, np.log(REFERENCE))
    assert np.abs(found.numpy() - right).max() < 1e-9


def tabular(weights: Tensor, split: TokenizedSplit) -> Tensor:
    """`[N, V]` logits of a policy over pairs of actions: a row of `weights` `[1 + V, V]` for the
    first, and one for the second after each first.
    """
    pairs = split.input_ids.reshape(-1, 3)[:, 1:].astype(np.int64)
    rows = np.stack([np.zeros(len(pairs), np.int64), 1 + pairs[:, 0]], 1)
    return weights[torch.from_numpy(rows.reshape(-1))]


def logps_of(weights: Tensor, split: TokenizedSplit) -> Any:
    logps_NV = tabular(weights, split).log_softmax(-1)
    chosen_N = torch.from_numpy(split.input_ids[split.label_mask].astype(np.int64))
    return logps_NV.gather(1, chosen_N[:, None])[:, 0].detach().numpy()


def test_a_penalty_in_the_reward_is_that_of_completions() -> None:
    """Over two tokens the gradient is that of E[r] - beta KL over whole completions, with what the
    first token does to the divergence of the second.
    """
    rng, beta, size = np.random.default_rng(0), 0.4, 3
    counts = rng.integers(1, 9, (size, size))
    rewards = torch.tensor(rng.normal(size=(size, size)))
    reference = torch.tensor(rng.normal(size=(1 + size, size)))
    policy = torch.tensor(np.log(np.vstack([counts.sum(1), counts])), requires_grad=True)

    def joint(weights: Tensor) -> Tensor:
        logps = weights.log_softmax(-1)
        return logps[0][:, None] + logps[1:]

    own = joint(policy)
    value = (own.exp() * (rewards - beta * (own - joint(reference)))).sum()
    (right,) = torch.autograd.grad(value, policy)
    train = train_config(
        scale_rewards="none",
        loss_type="dr_grpo",
        num_generations=int(counts.sum()),
        max_completion_length=1,
        beta=beta,
        kl="reward",
    )
    totals = [np.repeat(rewards.numpy().reshape(-1), counts.reshape(-1))]
    split, _ = weighed(
        train,
        taken(counts),
        totals,
        logps=lambda split: logps_of(policy, split),
        base=lambda split: logps_of(reference, split),
    )
    (found,) = torch.autograd.grad(step_loss(train, split, tabular(policy, split)), policy)
    assert (found + right).abs().max() < 1e-9


def spread_evenly(shares: Any, count: int) -> Any:
    """`count` actions in all, each as often as its share says, but for rounding."""
    ends = np.floor(np.cumsum(shares) * count + 0.5).astype(int)
    return np.diff(ends, prepend=0)


@pytest.mark.parametrize("kl", ["loss", "reward"])
def test_training_ends_at_the_regularised_optimum(kl: str) -> None:
    """p_ref exp(r / beta) / Z, which no smaller or larger pull would leave."""
    beta, count = 0.5, 1000
    aim = REFERENCE * np.exp(REWARDS / beta)
    aim /= aim.sum()
    logits = torch.tensor(np.log(REFERENCE))
    train = train_config(scale_rewards="none", num_generations=count, beta=beta, kl=kl)
    for _ in range(150):
        counts = spread_evenly(logits.softmax(-1).numpy(), count)
        totals = [np.repeat(REWARDS, counts)]
        found = gradient(train, taken(counts), totals, logits, np.log(REFERENCE))
        logits = logits - 4.0 * found
    distance = 0.5 * np.abs(logits.softmax(-1).numpy() - aim).sum()
    print(f"{kl}: total variation {distance:.4f}")
    assert 0.5 * np.abs(REFERENCE - aim).sum() > 0.3
    assert distance < 0.01


def rolled_out(train: TrainConfig, seed: int = 0) -> tuple[TokenizedSplit, Tensor]:
    """A rollout of four groups with completions of different lengths, and log-probabilities that
    have gone away from those of its sampling.
    """
    rng = np.random.default_rng(seed)
    each = train.rollout.num_generations
    said = [
        [
            Said(
                tuple(rng.integers(1, 7, int(rng.integers(1, 6))).tolist()),
                bool(rng.random() < 0.7),
            )
            for _ in range(each)
        ]
        for _ in range(4)
    ]
    count = sum(len(one.ids) for group in said for one in group)
    sampled, base = -rng.random(count) * 3 - 0.1, -rng.random(count) * 3 - 0.1
    split, _ = weighed(
        train,
        said,
        rng.normal(size=(4, each)),
        logps=lambda _: sampled,
        base=lambda _: base,
        weights_P=np.array([0.0, 0.5, 1.0, 2.5]),
    )
    near = torch.from_numpy(np.asarray(split.label_columns["sampled"]))
    return split, near + 0.3 * torch.from_numpy(rng.normal(size=len(near)))


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_the_loss(name: str) -> None:
    """By finite differences; of cispo, which holds its ratio fixed, by what that leaves."""
    train = train_config(
        **{"num_iterations": 2, "num_generations": 4, "max_completion_length": 6}
        | {k: v for k, v in CASES[name].items() if k != "steps_per_generation"}
        | ({"num_iterations": 2} if "num_iterations" not in CASES[name] else {})
    )
    split, logps_N = rolled_out(train)
    objective = Grpo(settings=train.grpo, rollout=train.rollout)
    batch = in_one_batch(split)
    logps_N.requires_grad_()
    if train.grpo.loss_type != "cispo":
        assert torch.autograd.gradcheck(
            lambda logps: objective.losses_of(logps, batch), logps_N, eps=1e-6, rtol=1e-6, atol=1e-7
        )
        return
    (found,) = torch.autograd.grad(objective.losses_of(logps_N, batch).sum(), logps_N)
    ratio_N = (logps_N - batch.label_columns["sampled"]).exp().clamp_max(train.grpo.high)
    by_example = batch.columns["weight"][:, 0] * batch.columns["advantage"][:, 0]
    right = -ratio_N * by_example.index_select(0, batch.owners_N)
    assert (found - right).abs().max() < 1e-12


@pytest.mark.parametrize("name", ["dapo", "beta, sequence", "delta"])
def test_gradients_reach_the_weights_of_a_model(tmp_path: Path, name: str) -> None:
    """Central differences of a step's loss along a direction in the weights of two layers."""
    from transformers import AutoModelForCausalLM

    settings = {"num_iterations": 2, "num_generations": 4, "max_completion_length": 6}
    train = train_config(**settings | CASES[name], temperature=0.8)
    split, _ = rolled_out(train)
    batch = in_one_batch(split)
    with true_float64():
        model = AutoModelForCausalLM.from_pretrained(save_tiny_llama(tmp_path)).double()
        objective = Grpo(settings=train.grpo, rollout=train.rollout)
        count = objective.count(split, np.arange(len(split)))

        def logits() -> Tensor:
            hidden: Tensor = model(batch.tokens_BS, attention_mask=batch.attention_BS).logits
            return hidden.flatten(0, 1)[batch.labels_N]

        with torch.no_grad():  # ratios near 1, on both sides of the clip
            model_N = label_logps(cast(Any, Spoken(logits())), batch, train.rollout.temperature)
            noise_N = torch.randn(len(model_N), generator=torch.Generator().manual_seed(0))
            batch.label_columns["sampled"] = model_N + 0.3 * noise_N.double()

        def loss() -> Tensor:
            return objective.losses(cast(Any, Spoken(logits())), batch).sum() / count

        weights = list(model.parameters())
        generator = torch.Generator().manual_seed(1)
        ways = [torch.randn(w.shape, generator=generator, dtype=torch.float64) for w in weights]
        slope, measured = slopes(loss, weights, ways)
    print(f"{name}: {slope:.8f}, by differences {measured:.8f}")
    assert abs(measured - slope) < 1e-6 * max(1.0, abs(slope))
