"""Losses on rollouts: against TRL step by step, and where they are known in closed form."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from raytune_ft.config.schema import Config
from raytune_ft.train.rollouts import Answered, Prompt, Speaker
from tests.support.objectives import config_of, save_inputs
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

    def answer(self: Speaker, prompts: Any, count: int) -> Answered:
        found = plain(self, prompts, count)
        if count > 1:
            heard.append(([prompt for _, prompt in prompts], found))
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
