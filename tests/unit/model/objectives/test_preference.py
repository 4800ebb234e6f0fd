"""Losses on pairs: against TRL step by step, and where their optimum is known."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from raytune_ft.config.schema import Config
from raytune_ft.data.formats.preference import MARGIN
from raytune_ft.data.order import Order
from raytune_ft.data.prepare import PreparedData, open_prepared
from raytune_ft.data.split import TokenizedSplit
from raytune_ft.model.objectives.preference import PAIR_LOSSES
from tests.support.objectives import config_of, save_inputs
from tests.support.runs import final_weights, losses, run

STEPS, BATCH = 20, 4
EPSILON = 1e-5
"""Of Adam; a smaller one makes steps out of the rounding of gradients that are near 0."""
TRAIN: dict[str, Any] = {
    "data.train.example_weight": None,
    "method": {"name": "full"},
    "train.batch_size": BATCH,
    "train.max_examples": STEPS * BATCH,
    "train.eval_every_examples": STEPS * BATCH,
    "train.lr": 1e-3,
    "train.adam_epsilon": EPSILON,
    "train.lr_schedule": "constant",
    "train.warmup_fraction": 0.0,
    "train.weight_decay": 0.0,
    "checkpoint.asynchronous": False,
}
ARGUMENTS: dict[str, Any] = {
    "per_device_train_batch_size": BATCH,
    "max_steps": STEPS,
    "learning_rate": 1e-3,
    "adam_epsilon": EPSILON,
    "lr_scheduler_type": "constant",
    "train_sampling_strategy": "sequential",
    "bf16": False,
    "gradient_checkpointing": False,
    "use_cpu": True,
    "logging_steps": 1,
    "logging_nan_inf_filter": False,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "max_length": None,
    "seed": 0,
}
DPO: dict[str, dict[str, Any]] = {
    **{name: {"loss_type": name} for name in PAIR_LOSSES if name not in ("robust", "exo_pair")},
    "robust": {"loss_type": "robust", "label_smoothing": 0.2},
    "exo_pair": {"loss_type": "exo_pair", "label_smoothing": 0.05},
    "sft": {"loss_type": "sft"},
    "a list": {"loss_type": ["sigmoid", "sft", "bco_pair"], "loss_weights": [0.8, 0.5, 0.1]},
    "a larger beta": {"loss_type": "sigmoid", "beta": 1.5},
    "ld": {"loss_type": "sigmoid", "ld_alpha": 0.3},
    "ld with ipo": {"loss_type": "ipo", "ld_alpha": 0.0},
    "forward KL": {"loss_type": "sigmoid", "f_divergence_type": "forward_kl"},
    "Jensen-Shannon": {"loss_type": "hinge", "f_divergence_type": "js_divergence"},
    "alpha": {
        "loss_type": "sigmoid_norm",
        "f_divergence_type": "alpha_divergence",
        "f_alpha_divergence_coef": 0.7,
    },
}
QUICK = ("sigmoid", "a list", "ld with ipo")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_inputs(tmp_path_factory.mktemp("inputs"))


def pairs_in_order(config: Config, run_dir: Path) -> tuple[TokenizedSplit, list[int]]:
    """The training split of a run, and its examples as the run has seen them."""
    caches = [path for path in (run_dir.parent / "cache").iterdir() if path.is_dir()]
    found: list[PreparedData] = [open_prepared(path) for path in caches if path.name[0] != "."]
    split = found[0].train
    return split, Order.plain(config.seed, len(split)).indices(0, STEPS * BATCH).tolist()


def tokens(split: TokenizedSplit, i: int) -> dict[str, list[int]]:
    """A pair as TRL's collators take it."""
    sequences = []
    for part in (2 * i, 2 * i + 1):
        start, stop = split.part_offsets[part : part + 2]
        sequences.append((split.input_ids[start:stop], split.label_mask[start:stop]))
    (chosen, mask), (rejected, _) = sequences
    prompt = int(mask.argmax())
    return {
        "prompt_ids": chosen[:prompt].tolist(),
        "chosen_ids": chosen[prompt:].tolist(),
        "rejected_ids": rejected[prompt:].tolist(),
    }


def trl_losses(trainer: Any) -> list[float]:
    trainer.train()
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def far(one: dict[str, Tensor], model: Any, names: Any = None) -> float:
    """The largest difference of weights, in units of how far they may move."""
    own = dict(model.named_parameters())
    return max(
        float((one[name].double() - own[name].detach().double()).abs().max())
        for name in one
        if name in own
    )


@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in DPO]
)
def test_dpo_is_trl(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    settings = DPO[name]
    config = config_of(inputs, "dpo", {**TRAIN, "train.dpo": settings})
    assert run(config, tmp_path / "run").status == "completed"
    split, order = pairs_in_order(config, tmp_path / "run")
    monkeypatch.setattr(trl.DPOTrainer, "_prepare_dataset", lambda self, rows, *others: rows)
    load = partial(AutoModelForCausalLM.from_pretrained, inputs / "decoder", dtype=torch.float32)
    trainer = trl.DPOTrainer(
        model=load(),
        ref_model=load(),
        args=trl.DPOConfig(output_dir=str(tmp_path / "trl"), **ARGUMENTS, **settings),
        train_dataset=datasets.Dataset.from_list([tokens(split, i) for i in order]),
        processing_class=AutoTokenizer.from_pretrained(inputs / "decoder"),
    )
    theirs, ours = trl_losses(trainer), losses(tmp_path / "run")
    worst = max(abs(a - b) / max(1.0, abs(b)) for a, b in zip(ours, theirs, strict=True))
    apart = far(final_weights(tmp_path / "run"), trainer.model)
    print(f"| {name} | {worst:.1e} | {apart:.1e} |")
    assert worst < 1e-5
    assert apart < 1e-5


def one_token_prompts(inputs: Path) -> Path:
    """Rows whose prompt is one token, which no loss can be on. TRL's term on the likelihood is of
    prompts too.
    """
    path = inputs / "short.jsonl"
    if not path.is_file():
        rows = [json.loads(line) for line in (inputs / "rows.jsonl").read_text().splitlines()]
        kept = [{**row, "prompt": "x"} for row in rows]
        path.write_text("".join(json.dumps(row) + "\n" for row in kept))
    return path


def labelled(split: TokenizedSplit, i: int) -> dict[str, list[int]]:
    """A pair as TRL's collator of CPO and ORPO takes it."""
    found: dict[str, list[int]] = {}
    pair = tokens(split, i)
    prompt = pair["prompt_ids"]
    found |= {"prompt_input_ids": prompt, "prompt_attention_mask": [1] * len(prompt)}
    for name in ("chosen", "rejected"):
        answer = pair[f"{name}_ids"]
        found[f"{name}_input_ids"] = prompt + answer
        found[f"{name}_attention_mask"] = [1] * (len(prompt) + len(answer))
        found[f"{name}_labels"] = [-100] * len(prompt) + answer
    return found


@pytest.mark.parametrize(
    ("objective", "settings"),
    [
        ("simpo", {"beta": 2.0, "simpo_gamma": 0.5}),
        ("simpo", {"beta": 0.7, "simpo_gamma": 0.0, "cpo_alpha": 0.3}),
        ("orpo", {"beta": 0.4}),
    ],
)
def test_simpo_and_orpo_are_trl(
    inputs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    objective: str,
    settings: dict[str, Any],
) -> None:
    pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl.experimental.cpo import CPOConfig, CPOTrainer
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    changes = {**TRAIN, f"train.{objective}": settings, "data.separator": ""}
    changes["data.train.path"] = str(one_token_prompts(inputs))
    config = config_of(inputs, objective, changes)
    assert run(config, tmp_path / "run").status == "completed"
    split, order = pairs_in_order(config, tmp_path / "run")
    kind, arguments = (CPOTrainer, CPOConfig) if objective == "simpo" else (ORPOTrainer, ORPOConfig)
    own = {"loss_type": "simpo", "cpo_alpha": 0.0} if objective == "simpo" else {}
    monkeypatch.setattr(kind, "tokenize_row", lambda self, row, model=None: row)
    trainer = kind(
        model=AutoModelForCausalLM.from_pretrained(inputs / "decoder", dtype=torch.float32),
        args=arguments(
            output_dir=str(tmp_path / "trl"),
            **{**ARGUMENTS, "max_length": 512},
            **own | settings,
            remove_unused_columns=False,
        ),
        train_dataset=datasets.Dataset.from_list(
            [{**labelled(split, i), "prompt": "", "chosen": "", "rejected": ""} for i in order]
        ),
        processing_class=AutoTokenizer.from_pretrained(inputs / "decoder"),
    )
    theirs, ours = trl_losses(trainer), losses(tmp_path / "run")
    worst = max(abs(a - b) / max(1.0, abs(b)) for a, b in zip(ours, theirs, strict=True))
    apart = far(final_weights(tmp_path / "run"), trainer.model)
    print(f"| {objective} {settings} | {worst:.1e} | {apart:.1e} |")
    assert worst < 1e-5
    assert apart < 1e-5


@pytest.mark.parametrize("settings", [{}, {"center_rewards_coefficient": 0.2}])
def test_reward_is_trl(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, float]
) -> None:
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    load = partial(AutoModelForSequenceClassification.from_pretrained, dtype=torch.float32)
    base = tmp_path / "base"
    torch.manual_seed(0)
    load(inputs / "decoder", num_labels=1, pad_token_id=1).save_pretrained(base)
    AutoTokenizer.from_pretrained(inputs / "decoder").save_pretrained(base)
    changes = {**TRAIN, "train.reward": settings, "model.path": str(base)}
    config = config_of(inputs, "reward", changes)
    assert run(config, tmp_path / "run").status == "completed"
    split, order = pairs_in_order(config, tmp_path / "run")
    rows = []
    for i in order:
        pair = tokens(split, i)
        answers = {name: pair["prompt_ids"] + pair[name] for name in ("chosen_ids", "rejected_ids")}
        rows.append({**answers, "margin": float(split.columns[MARGIN][i, 0])})
    monkeypatch.setattr(trl.RewardTrainer, "_prepare_dataset", lambda self, rows, *others: rows)
    trainer = trl.RewardTrainer(
        model=load(base),
        args=trl.RewardConfig(output_dir=str(tmp_path / "trl"), **ARGUMENTS, **settings),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(base),
    )
    theirs, ours = trl_losses(trainer), losses(tmp_path / "run")
    worst = max(abs(a - b) / max(1.0, abs(b)) for a, b in zip(ours, theirs, strict=True))
    apart = far(final_weights(tmp_path / "run"), trainer.model)
    print(f"| reward {settings} | {worst:.1e} | {apart:.1e} |")
    assert worst < 1e-5
    assert apart < 1e-5
