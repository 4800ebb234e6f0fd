"""Turn a checkpoint into a plain model directory, and prove that it computes the same.

The fold is done by PEFT on a base held in float32, so that W + B@A * scale (and what rsLoRA, DoRA
and rank patterns make of it) is added up in float32 and rounded once, into the dtype that the
base has on disk.

What is proved before anybody gets to see the directory:

1. In float32, before rounding, the folded model has the logits of base + adapter, to 1e-4 (or to
   1e-5 of the largest logit, where that is more: float32 holds seven digits).
2. The directory, loaded by plain transformers, holds the very bits that the fold made.
3. Rounded to bfloat16 or float16, its logits stay within 1/32 (root mean square, relative to the
   logits' spread) of those of base + adapter. One rounding moves a weight by up to 2^-9 of itself
   and a model of a few dozen layers by about 1 %; this bound catches a base whose dtype cannot
   hold what was learned, and is not needed to catch a wrong fold, which 1 and 2 do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from raytune_ft.config.schema import ModelConfig
from raytune_ft.data.split import TokenizedSplit
from raytune_ft.errors import CheckpointError, MergeError
from raytune_ft.model.build import disk_dtype, load_base

ABSOLUTE_TOLERANCE = 1e-4
RELATIVE_TOLERANCE = 1e-5
ROUNDING_TOLERANCE = 2.0**-5
CHECKED_EXAMPLES = 8
CHECKED_TOKENS = 64  # of each; a vocabulary of 150,000 makes 40 MB of logits of them
ADAPTER_WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True)
class FoldCheck:
    """How far the written model is from base + adapter, on `tokens` held-out tokens.

    Attributes:
        dtype: of the written weights.
        tolerance: largest absolute difference of a logit allowed where nothing is rounded.
        fold_difference: the largest in float32, before rounding; held to `tolerance`.
        written_difference: likewise of the written directory; held to it in float32 alone.
        rounding: root mean square of that difference, relative to the spread of the logits.
        rounding_tolerance: what it was held to, None where nothing is rounded.
    """

    dtype: str
    tokens: int
    tolerance: float
    fold_difference: float
    written_difference: float
    rounding: float
    rounding_tolerance: float | None


def fold(
    model: ModelConfig, checkpoint: Path, target: Path, examples: Sequence[Tensor]
) -> FoldCheck:
    """Write `checkpoint` (an adapter of `model`, or a whole model) into `target`, and check it.

    `examples` are token ids `[S]` that training has not seen, see `held_out`.

    Raises:
        CheckpointError: the checkpoint holds no safetensors weights, or those of another model.
        MergeError: the written model differs from base + adapter beyond the tolerance.
        ModelError: the base cannot be loaded, or is quantised.
    """
    dtype = disk_dtype(model)
    combined = _load_combined(model, checkpoint).eval()
    reference = _logits(combined, examples)
    folded = merge(combined) if isinstance(combined, PeftModel) else combined
    exact = _logits(folded, examples)
    folded.to(dtype)
    folded.save_pretrained(str(target))
    reloaded = _reload(target, model)
    _require_same_bits(folded, reloaded, dtype)
    return _check(reference, exact, _logits(reloaded.float(), examples), dtype)


def merge(combined: PeftModel) -> Any:
    """The base with the adapter's delta in its weights, in the dtype of `combined`.

    An output head that shares its weight with the input embedding is given its own copy first if
    the adapter touches either of them; shared, one delta would change both or be lost on saving.

    Raises:
        MergeError: the delta holds values that are not finite.
    """
    base: Any = combined.get_base_model()
    head, embedding = base.get_output_embeddings(), base.get_input_embeddings()
    if any(isinstance(module, BaseTunerLayer) for module in (head, embedding)):
        plain = head.get_base_layer() if isinstance(head, BaseTunerLayer) else head
        plain.weight = nn.Parameter(plain.weight.detach().clone())
        base.config.get_text_config().tie_word_embeddings = False
        base.config.tie_word_embeddings = False
        base.all_tied_weights_keys = {}
    try:
        return combined.merge_and_unload(safe_merge=True)
    except ValueError as cause:
        raise MergeError(f"the adapter cannot be folded into its base: {cause}") from cause


def held_out(split: TokenizedSplit) -> list[Tensor]:
    """Token ids `[S]` of the first examples of a split, cut short: what a fold is checked on."""
    return [
        torch.from_numpy(split.example(i)[0][:CHECKED_TOKENS].astype(np.int64))
        for i in range(min(CHECKED_EXAMPLES, len(split)))
    ]


def _load_combined(model: ModelConfig, checkpoint: Path) -> Any:
    """Base + adapter in float32, or the whole model that the checkpoint holds."""
    if (checkpoint / "config.json").is_file():
        whole = model.model_copy(update={"path": str(checkpoint), "revision": None})
        return load_base(whole, torch.float32)
    if not (checkpoint / ADAPTER_WEIGHTS).is_file():
        # PEFT would look for a pickle next.
        raise CheckpointError(f"{checkpoint} holds neither config.json nor {ADAPTER_WEIGHTS}")
    base = load_base(model, torch.float32)
    try:
        combined = PeftModel.from_pretrained(base, str(checkpoint), is_trainable=False)
    except (RuntimeError, ValueError, KeyError) as cause:
        reason = str(cause).strip().splitlines()[0]
        raise CheckpointError(f"{checkpoint} is no adapter of {model.path}: {reason}") from cause
    _require_whole_adapter(combined, checkpoint / ADAPTER_WEIGHTS)
    return combined


def _reload(directory: Path, model: ModelConfig) -> Any:
    """As anybody would load it."""
    return AutoModelForCausalLM.from_pretrained(
        str(directory), dtype="auto", trust_remote_code=model.trust_remote_code
    )


def _require_whole_adapter(combined: PeftModel, weights: Path) -> None:
    """PEFT takes an adapter of another shape of model with a warning, and leaves the rest at 0."""
    with safe_open(weights, "pt") as tensors:
        saved = set(tensors.keys())
    loaded = set(get_peft_model_state_dict(combined, save_embedding_layers=False))
    if saved != loaded:
        odd = sorted(saved ^ loaded)
        raise CheckpointError(
            f"{weights} is the adapter of another model: {len(odd)} weights differ, "
            f"among them {odd[0]}"
        )


@torch.no_grad()
def _logits(model: Any, examples: Sequence[Tensor]) -> Tensor:
    """`[N, V]`: the logits of all examples one after another, each computed alone."""
    model.eval()
    return torch.cat([model(ids_S[None], use_cache=False).logits[0] for ids_S in examples])


def _require_same_bits(folded: Any, reloaded: Any, dtype: torch.dtype) -> None:
    """Every weight that was loaded back is the one that was folded."""
    expected, found = folded.state_dict(), reloaded.state_dict()
    odd = expected.keys() ^ found.keys()
    odd |= {
        name
        for name in expected.keys() & found.keys()
        if not torch.equal(found[name].to(expected[name].dtype), expected[name])
    }
    if reloaded.dtype != dtype:
        raise MergeError(f"the folded model was written in {reloaded.dtype}, not in {dtype}")
    if odd:
        raise MergeError(f"{len(odd)} folded weights were not written, among them {min(odd)}")


def _check(reference: Tensor, exact: Tensor, written: Tensor, dtype: torch.dtype) -> FoldCheck:
    """Compare logits `[N, V]`.

    Raises:
        MergeError: a difference is larger than its tolerance, or not a number.
    """
    rounds = dtype.itemsize < torch.float32.itemsize
    tolerance = max(ABSOLUTE_TOLERANCE, RELATIVE_TOLERANCE * reference.abs().max().item())
    spread = (reference - reference.mean(-1, keepdim=True)).square().mean().sqrt().item()
    check = FoldCheck(
        dtype=str(dtype).removeprefix("torch."),
        tokens=len(reference),
        tolerance=tolerance,
        fold_difference=(exact - reference).abs().max().item(),
        written_difference=(written - reference).abs().max().item(),
        rounding=(written - reference).square().mean().sqrt().item() / (spread or 1.0),
        rounding_tolerance=ROUNDING_TOLERANCE if rounds else None,
    )
    # Written so that NaN is refused.
    if not check.fold_difference <= tolerance:
        raise MergeError(
            f"the folded model's logits differ from base + adapter by {check.fold_difference:.1e}, "
            f"more than {tolerance:.1e}"
        )
    if not rounds and not check.written_difference <= tolerance:
        raise MergeError(
            f"the written model's logits differ from base + adapter by "
            f"{check.written_difference:.1e}, more than {tolerance:.1e}"
        )
    if rounds and not check.rounding <= ROUNDING_TOLERANCE:
        raise MergeError(
            f"rounding to {check.dtype} moves the logits by {check.rounding:.1%} of their spread, "
            f"more than {ROUNDING_TOLERANCE:.1%}"
        )
    return check
