"""Losses on pairs: against TRL step by step, and where their optimum is known."""

from __future__ import annotations

import json
import math
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from raytune_ft.config.preference import DpoConfig, OrpoConfig, RewardModelConfig, SimpoConfig
from raytune_ft.config.schema import Config
from raytune_ft.data.formats.example import DESIRABLE
from raytune_ft.data.formats.preference import MARGIN
from raytune_ft.data.order import Order
from raytune_ft.data.prepared import PreparedData, open_prepared
from raytune_ft.data.split import TokenizedSplit
from raytune_ft.model.objectives.preference import PAIR_LOSSES, Answers, Dpo, Orpo, Simpo
from raytune_ft.model.objectives.reward import Reward
from tests.support.models import true_float64
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
FLOAT32_ONLY = ("alpha",)  # in TRL


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
    (chosen, mask), (rejected, _) = map(split.sequence, (2 * i, 2 * i + 1))
    prompt = int(mask.argmax())
    return {
        "prompt_ids": chosen[:prompt].tolist(),
        "chosen_ids": chosen[prompt:].tolist(),
        "rejected_ids": rejected[prompt:].tolist(),
    }


def assert_same(name: str, run_dir: Path, trainer: Any) -> None:
    """Let TRL train: its losses and weights are those of the run."""
    trainer.train()
    theirs = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    pairs = zip(losses(run_dir), theirs, strict=True)
    worst = max(abs(ours - loss) / max(1.0, abs(loss)) for ours, loss in pairs)
    own = dict(trainer.model.named_parameters())
    apart = max(
        float((weight.double() - own[key].detach().double()).abs().max())
        for key, weight in final_weights(run_dir).items()
        if key in own
    )
    print(f"| {name} | {worst:.1e} | {apart:.1e} |")
    assert worst < 1e-5
    assert apart < 1e-5


@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in DPO]
)
def test_dpo_is_trl(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """In float64, since the rounding of float32 moves a loss of these steps by up to 2e-5."""
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    settings, wide = DPO[name], name not in FLOAT32_ONLY
    precision = "float64" if wide else "float32"
    changes = {**TRAIN, "train.dpo": settings, "train.precision": precision}
    config = config_of(inputs, "dpo", changes)
    monkeypatch.setattr(trl.DPOTrainer, "_prepare_dataset", lambda self, rows, *others: rows)
    load = partial(AutoModelForCausalLM.from_pretrained, inputs / "decoder", dtype=precision)
    with true_float64() if wide else nullcontext():
        assert run(config, tmp_path / "run").status == "completed"
        split, order = pairs_in_order(config, tmp_path / "run")
        trainer = trl.DPOTrainer(
            model=load(),
            ref_model=load(),
            args=trl.DPOConfig(output_dir=str(tmp_path / "trl"), **ARGUMENTS, **settings),
            train_dataset=datasets.Dataset.from_list([tokens(split, i) for i in order]),
            processing_class=AutoTokenizer.from_pretrained(inputs / "decoder"),
        )
        assert_same(name, tmp_path / "run", trainer)


def one_token_prompts(inputs: Path) -> Path:
    """Rows whose prompt is one token, which no loss can be on. TRL's term on the likelihood is of
    prompts too.
    """
    path = inputs / "short.jsonl"
    if not path.is_file():
        rows = [json.loads(line) for line in (inputs / "rows.jsonl").read_text().splitlines()]
        kept = [{**row, "prompt": "abcdefghij"[n % 10]} for n, row in enumerate(rows)]
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
    assert_same(f"{objective} {settings}", tmp_path / "run", trainer)


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
    assert_same(f"reward {settings}", tmp_path / "run", trainer)


@pytest.mark.parametrize(
    "settings",
    [
        {"beta": 0.4, "desirable_weight": 1.3, "undesirable_weight": 0.6},
        {"loss_type": "apo_zero_unpaired", "beta": 0.2},
    ],
)
def test_kto_is_trl(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    """Where a batch is one micro-batch and TRL is given the partners of ours."""
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    config = config_of(inputs, "kto", {**TRAIN, "train.kto": settings})
    assert run(config, tmp_path / "run").status == "completed"
    split, order = pairs_in_order(config, tmp_path / "run")
    assert split.partners is not None
    rows = []
    for i in order:
        (ids, mask), (beside, own) = split.example(i), split.partners.example(i)
        prompt = int(mask.argmax())
        assert beside[:prompt].tolist() == ids[:prompt].tolist()
        assert own[prompt:].all()
        rows.append(
            {
                "prompt_ids": ids[:prompt].tolist(),
                "completion_ids": ids[prompt:].tolist(),
                "KL_completion_ids": beside[prompt:].tolist(),
                "label": bool(split.columns[DESIRABLE][i, 0]),
            }
        )
    monkeypatch.setattr(trl.KTOTrainer, "_prepare_dataset", lambda self, rows, *others: rows)
    load = partial(AutoModelForCausalLM.from_pretrained, inputs / "decoder", dtype=torch.float32)
    trainer = trl.KTOTrainer(
        model=load(),
        ref_model=load(),
        args=trl.KTOConfig(output_dir=str(tmp_path / "trl"), **ARGUMENTS, **settings),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(inputs / "decoder"),
    )
    assert_same(f"kto {settings}", tmp_path / "run", trainer)


def answers(chosen: Tensor, rejected: Tensor, tokens: float = 1.0) -> Answers:
    """Of log-probabilities, with a reference that gives every answer the same."""
    ones = torch.full_like(chosen, tokens)
    return Answers(chosen, rejected, chosen, rejected, ones, ones)


def minimised(of: Any, count: int) -> Tensor:
    """The numbers `[count]` with the smallest value of a convex function."""
    numbers = torch.zeros(count, dtype=torch.float64, requires_grad=True)
    search = torch.optim.LBFGS(
        [numbers], lr=1.0, max_iter=500, tolerance_grad=1e-12, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        search.zero_grad()
        value: Tensor = of(numbers)
        value.backward()
        return value

    search.step(closure)
    return numbers.detach()


TRUE = torch.tensor([0.0, 0.4, -1.1, 2.0], dtype=torch.float64)
"""Rewards by which pairs are preferred, as Bradley and Terry have it."""
ONE, OTHER = torch.combinations(torch.arange(4)).T
WINS = torch.sigmoid(TRUE[ONE] - TRUE[OTHER])


def expected(loss: Any, numbers: Tensor) -> Tensor:
    """The mean loss over all pairs, each preferred as often as `WINS` says."""
    one, other = numbers[ONE], numbers[OTHER]
    return (WINS * loss(one, other) + (1 - WINS) * loss(other, one)).mean()


@pytest.mark.parametrize("beta", [0.1, 2.0])
def test_dpo_finds_the_differences_of_rewards(beta: float) -> None:
    dpo = DpoConfig(beta=beta)
    found = minimised(
        lambda x: expected(lambda a, b: PAIR_LOSSES["sigmoid"](answers(a, b), dpo), x), 4
    )
    assert (beta * (found - found[0]) - (TRUE - TRUE[0])).abs().max() < 1e-4


@pytest.mark.parametrize("beta", [0.1, 2.0])
def test_ipo_stops_at_its_margin(beta: float) -> None:
    dpo, wins = DpoConfig(beta=beta), 0.8
    found = minimised(
        lambda x: (
            wins * PAIR_LOSSES["ipo"](answers(x, -x), dpo).sum()
            + (1 - wins) * PAIR_LOSSES["ipo"](answers(-x, x), dpo).sum()
        ),
        1,
    )
    assert (2 * found - (2 * wins - 1) / (2 * beta)).abs() < 1e-6


@pytest.mark.parametrize("center", [0.0, 1e-4])
def test_a_reward_model_is_known_up_to_a_constant(center: float) -> None:
    objective = Reward(RewardModelConfig(center_rewards_coefficient=center))
    found = minimised(
        lambda x: expected(lambda a, b: objective.columns_of(a, b, {})["loss"], x + 0.7), 4
    )
    assert (found - found[0] - (TRUE - TRUE[0])).abs().max() < (1e-2 if center else 1e-4)
    if center:
        assert (found + 0.7).mean().abs() < 0.05


def test_simpo_aims_at_its_margin() -> None:
    objective = Simpo(settings=SimpoConfig(beta=2.0, simpo_gamma=0.5))
    wins = 0.8
    found = minimised(
        lambda x: (
            wins * objective.of(answers(x, -x)).sum()
            + (1 - wins) * objective.of(answers(-x, x)).sum()
        ),
        1,
    )
    # Above the margin, where the pull of both kinds of pairs is the same.
    margin = 2 * 2.0 * found
    pull = wins * (0.5 - margin).sigmoid() - (1 - wins) * (0.5 + margin).sigmoid()
    assert pull.abs() < 1e-4
    assert margin > math.log(wins / (1 - wins))


OBJECTIVES = {
    **{name: Dpo(settings=DpoConfig.model_validate(each)) for name, each in DPO.items()},
    "orpo": Orpo(settings=OrpoConfig(beta=0.3)),
    "simpo": Simpo(settings=SimpoConfig(cpo_alpha=0.2)),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_gradients_are_those_of_the_loss(name: str) -> None:
    objective = replace(OBJECTIVES[name], pairs_per_token=0.2)
    rng = torch.Generator().manual_seed(0)
    logps = -torch.rand(4, 5, generator=rng, dtype=torch.float64) * 3 - 0.1
    ratios = torch.randn(2, 5, generator=rng, dtype=torch.float64)
    lengths = torch.tensor([3.0, 2.0, 7.0, 1.0, 4.0], dtype=torch.float64)

    def loss(chosen: Tensor, rejected: Tensor, better: Tensor, worse: Tensor) -> Tensor:
        return objective.of(Answers(chosen, rejected, better, worse, lengths, lengths.flip(0)))

    inputs = [each.clone().requires_grad_() for each in (logps[0], logps[1], *ratios)]
    assert torch.autograd.gradcheck(loss, inputs, eps=1e-6, atol=1e-6, rtol=1e-6)


def test_equal_rewards_are_half_right() -> None:
    x = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    columns = Reward(RewardModelConfig()).columns_of(x, torch.tensor([1.0, 1.0, 4.0]), {})
    assert columns["preferred"].tolist() == [0.5, 1.0, 0.0]
