"""One small config of every method, for the suites that hold all methods to one contract."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from raytune_ft.config.execution import packable
from raytune_ft.config.methods import METHODS
from raytune_ft.config.rules import refusal
from raytune_ft.config.schema import Config
from raytune_ft.config.strategies import STRATEGIES
from raytune_ft.data.prepare import prepare_data
from raytune_ft.data.split import TokenizedSplit
from raytune_ft.model.load import load_tokenizer
from raytune_ft.model.quantise import keep_as_rounded
from tests.support import activations
from tests.support.runs import make_config

SMALL: dict[str, dict[str, Any]] = {
    "full": {"lr": 1e-3},
    "freeze": {"lr": 3e-3, "last": 1, "norms": True},
    "lora": {"rank": 4},
    "qlora": {"rank": 4},
    "ia3": {"lr": 3e-2},
    "vera": {"lr": 3e-2, "rank": 32},
    "oft": {"block_size": 8},
}
"""By the name of the method: its keys, and a rate at which it learns something in a dozen steps."""

ON_ACTIVATIONS = {
    name: {key: value for key, value in method.items() if key != "name"}
    for name, method in activations.METHODS.items()
}
"""Held to the same by suites of their own, since they need to know where examples stand."""

# Other keys of the same methods, which layouts must not show either.
VARIANTS: dict[str, dict[str, Any]] = {
    "lora pissa": {"rank": 3, "alpha": 4.0, "init": "pissa", "lr": 2e-3},
    "lora olora": {"rank": 3, "alpha": 4.0, "init": "olora", "rslora": True, "lr": 2e-3},
    "lora plus": {"rank": 4, "lr_ratio": 4.0, "rank_pattern": {"q_proj": 2}, "lr": 3e-3},
    "freeze gradually": {"embeddings": True, "unfreeze_every_examples": 20, "lr": 1e-3},
}

# Their package is not installed.
ABSENT = ("qlora",) if find_spec("bitsandbytes") is None else ()
# Not compared in float64, which bitsandbytes and PEFT's PiSSA and OLoRA do not support.
FLOAT32_ONLY = ("qlora", "lora pissa", "lora olora")


def small_config(name: str, inputs: tuple[Path, Path], **changes: Any) -> Config:
    """A run of a dozen steps of a method or a variant; `changes` are keys with `__` for the dot."""
    written: Mapping[str, Any] = {**SMALL, **VARIANTS, **ON_ACTIVATIONS}[name]
    method = {key: value for key, value in written.items() if key != "lr"}
    return make_config(
        *inputs,
        {
            "method": {"name": name.split()[0], **method},
            "train.lr": written.get("lr", 1e-2),
            "train.adam_epsilon": 1e-6,
            "train.max_examples": 7 * 12 - 3,
            "train.eval_every_examples": 42,
            "checkpoint.every_examples": 42,
            **{key.replace("__", "."): value for key, value in changes.items()},
        },
    )


def is_served(name: str, strategy: str) -> bool:
    """What the facts say: whether the strategy can train the method or variant."""
    return refusal(small_config(name, (Path("model"), Path("rows"))).method, strategy) is None


def held_out(config: Config, cache: Path) -> TokenizedSplit:
    """The validation set of such a run."""
    data = prepare_data(config.data, load_tokenizer(config.model), config.seed, cache)
    assert data.validation is not None
    return data.validation


@torch.no_grad()
def plain_loss(base: Path, model: Path, split: TokenizedSplit, in_4_bits: bool = False) -> float:
    """The loss over label tokens by transformers and PEFT alone, one example after another."""
    if (model / "config.json").is_file():
        loaded: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    else:
        rounding: Any = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        )
        plain = AutoModelForCausalLM.from_pretrained(
            base, dtype=torch.float32, quantization_config=rounding if in_4_bits else None
        )
        keep_as_rounded(plain)
        loaded = PeftModel.from_pretrained(plain, str(model))
    loaded.eval()
    total, count = 0.0, 0
    for index in range(len(split)):
        ids, mask = (torch.from_numpy(array.copy()) for array in split.example(index))
        ids, keep = ids.long(), mask.bool()[1:]
        logits = loaded(input_ids=ids[None], use_cache=False).logits[0]
        logits = logits[-len(ids) :][:-1]  # virtual tokens, if any, come first
        total += F.cross_entropy(logits[keep].double(), ids[1:][keep], reduction="sum").item()
        count += int(keep.sum())
    return total / count


def support_table() -> str:
    """Markdown: what the facts of methods and strategies say; the suite proves every cell."""
    lines = [
        f"| method | {' | '.join(STRATEGIES)} | packed rows | trials on one base | folded |",
        "|---" * 8 + "|",
    ]
    for name in [*SMALL, *VARIANTS, *ON_ACTIVATIONS]:
        config = small_config(name, (Path("model"), Path("rows")))
        facts = METHODS[config.method.name]
        cells = ["yes" if is_served(name, each) else "no" for each in STRATEGIES]
        cells.append("yes" if facts.one_example_rows is None else "no")
        cells.append("yes" if packable(config) is None else "no")
        cells.append("is a model" if facts.whole_model else "no" if facts.on_activations else "yes")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
