"""Turn a checkpoint into a plain model directory, and check that it computes the same.

No model is loaded. W + B@A * scale (with rsLoRA, DoRA, patterns, embeddings and saved modules) is
computed in float32, some rows of a tensor at a time, and rounded once, to the dtype that the tensor
has in the base's files. What training did not touch keeps its bytes. An interrupted fold continues
where it stopped.

Three checks, by models whose weights are read layer by layer, before `manifest.json` is written:

1. In float32, before rounding, the folded model has the logits of base + adapter in PEFT, to 1e-4
   (or to 1e-5 of the largest logit, where that is more: float32 holds seven digits).
2. The written directory, built by transformers and read back, has them too where it is float32.
3. Rounded to bfloat16 or float16, its logits stay within 1/32 (root mean square, relative to the
   logits' spread) of those of base + adapter. One rounding moves a weight by up to 2^-9 of itself
   and a model of a few dozen layers by about 1 %; this bound catches a base whose dtype cannot
   hold what was learned. A wrong fold is caught by 1.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from raytune_ft.config.schema import ModelConfig
from raytune_ft.config.section import parse_size
from raytune_ft.data.split import TokenizedSplit
from raytune_ft.errors import MergeError, ModelError
from raytune_ft.files import sha256_of, write_json_atomic
from raytune_ft.layout import ADAPTER_CONFIG, ADAPTER_WEIGHTS, MANIFEST
from raytune_ft.merge.adapter_plan import read_adapter_config
from raytune_ft.merge.folded_weights import Adapted, Headed
from raytune_ft.merge.streaming_forward import Weights
from raytune_ft.merge.verify import (
    ABSOLUTE_TOLERANCE,
    FoldCheck,
    compare,
    run_adapter,
    run_weights,
)
from raytune_ft.merge.write_model import (
    MAX_SHARD_SIZE,
    forget_journal,
    plan_hash,
    write_weights,
)
from raytune_ft.model.export import save_configs
from raytune_ft.model.heads import Head
from raytune_ft.model.load import (
    base_folder,
    disk_dtype,
    folder_here,
    load_model_config,
    own_dtypes,
)
from raytune_ft.model.meta import Outline, outline
from raytune_ft.records import FileRecord, Tell
from raytune_ft.tensors.read import TensorFiles, open_model

__all__ = ["ABSOLUTE_TOLERANCE", "FoldCheck", "Opened", "fold", "held_out", "open_checkpoint"]

PROCESSORS = ("*processor_config.json", "chat_template.json")
CHECKED_EXAMPLES = 8
CHECKED_UNDER_A_HEAD = 32  # a head gives one row of logits for each example
CHECKED_TOKENS = 64  # of each


@dataclass(frozen=True)
class Opened:
    """A checkpoint as `Weights`.

    `tied`: the head is the input embedding. `reference` computes the logits `[N, V]` of base +
    adapter in PEFT; None for a whole model. `identity` changes when any of the files does.
    """

    weights: Weights
    outline: Outline
    tied: bool
    reference: Callable[[Sequence[Tensor]], Tensor] | None
    identity: object


def fold(
    model: ModelConfig,
    checkpoint: Path,
    target: Path,
    examples: Sequence[Tensor],
    max_shard_size: str = MAX_SHARD_SIZE,
    dtype: torch.dtype | None = None,
    tell: Tell = lambda line: None,
    head: Head | None = None,
) -> FoldCheck:
    """Write `checkpoint` (an adapter of `model`, or a whole model) into `target`, and check it.

    `examples` are token ids `[S]` that were not trained on, see `held_out`. `dtype` of the written
    weights; None is that of each in the base. `head` is the task head of the checkpoint. A `target`
    in which the same fold was interrupted is completed.

    Raises:
        CheckpointError: the checkpoint holds no safetensors weights, or those of another model.
        MergeError: the written model differs from base + adapter beyond the tolerance.
        ModelError: the base cannot be read, is quantised, or would run code of its own.
        StorageError: `target` holds something else.
    """
    with open_checkpoint(model, checkpoint, head) as opened:
        files = write_model(model, opened, target, max_shard_size, dtype, tell)
        reference = opened.reference(examples) if opened.reference else None
        check = check_written(model, opened, target, examples, reference)
        require_bytes(target, files)
    write_manifest(target, files, check, {"base": model.path, "checkpoint": str(checkpoint)})
    return check


def held_out(split: TokenizedSplit, head: Head | None = None) -> list[Tensor]:
    """Token ids `[S]` of the first sequences of a split, cut short, to check a fold on."""
    wanted = CHECKED_EXAMPLES if head is None else CHECKED_UNDER_A_HEAD
    sequences = map(split.sequence, range(min(wanted, len(split) * split.parts)))
    return [torch.from_numpy(ids[:CHECKED_TOKENS].astype(np.int64)) for ids, _ in sequences]


@contextmanager
def open_checkpoint(
    model: ModelConfig, checkpoint: Path, head: Head | None = None
) -> Iterator[Opened]:
    """An adapter of `model`, or a whole model, without loading it.

    Raises: see `fold`.
    """
    if (checkpoint / "config.json").is_file():
        own = model.model_copy(update={"path": str(checkpoint)})
        with open_model(checkpoint) as files:
            weights, found = _under(head, files, outline(own, head))
            tied = bool(getattr(found.model, "all_tied_weights_keys", None))
            yield Opened(weights, found, tied, None, _identity(files))
        return
    read_adapter_config(checkpoint)
    _refuse_quantised(model, head)
    with open_model(base_folder(model)) as files:
        base, found = _under(head, files, outline(model, head))
        adapted = Adapted(base, found, checkpoint)
        hashes = [sha256_of(checkpoint / name) for name in (ADAPTER_WEIGHTS, ADAPTER_CONFIG)]
        try:
            yield Opened(
                adapted,
                found,
                adapted.tied,
                partial(run_adapter, found, base, adapted),
                [_identity(files), hashes],
            )
        finally:
            adapted.close()


def _under(head: Head | None, files: TensorFiles, of: Outline) -> tuple[Weights, Outline]:
    if head is None:
        return files, of
    headed = Headed(files, of)
    return headed, headed.outline


def _refuse_quantised(model: ModelConfig, head: Head | None) -> None:
    config = load_model_config(model, head).get_text_config()
    if getattr(config, "quantization_config", None) is not None:
        raise ModelError(
            f"model.path={model.path}",
            "holds quantised weights, into which nothing can be folded",
            "write promote.base (--base of export): the model that it was quantised from",
        )


def write_model(
    model: ModelConfig,
    opened: Opened,
    target: Path,
    max_shard_size: str,
    dtype: torch.dtype | None,
    tell: Tell,
) -> list[FileRecord]:
    """Config, weights, and the base's files of processors, such as that of its images; `target` is
    completed if the same work was interrupted there.
    """
    size = parse_size(max_shard_size)
    plan = plan_hash(opened.identity, size, str(dtype))
    dtypes = dict.fromkeys(opened.weights.shapes, dtype) if dtype else own_dtypes(model)
    files = write_weights(opened.weights, target, plan, size, dtypes, tell)
    _save_config(opened, target, dtype or disk_dtype(model, opened.outline.head))
    if (folder := folder_here(model)) is not None:
        for file in (found for pattern in PROCESSORS for found in folder.glob(pattern)):
            shutil.copyfile(file, target / file.name)
    return files


def check_written(
    model: ModelConfig,
    opened: Opened,
    target: Path,
    examples: Sequence[Tensor],
    reference: Tensor | None,
    of: str = "base + adapter",
) -> FoldCheck:
    """Compare the written model with `reference`, or with its own weights before rounding.

    Raises:
        MergeError: see `compare`.
    """
    own = model.model_copy(update={"path": str(target)})
    head = opened.outline.head
    with open_model(target) as files:
        exact = run_weights(outline(own, head), opened.weights, examples)
        written = run_weights(outline(own, head), files, examples)
        floating = [d for d in map(files.dtype, files.shapes) if d.is_floating_point]
    narrowest = min(floating, key=lambda dtype: dtype.itemsize)
    return compare(exact if reference is None else reference, exact, written, narrowest, of)


def require_bytes(target: Path, files: Sequence[FileRecord]) -> None:
    """Read the files again and compare their hashes.

    Raises:
        MergeError: a file does not hold the bytes that were written into it.
    """
    for record in files:
        if sha256_of(target / record.path) != record.sha256:
            raise MergeError(f"{target / record.path} does not hold the bytes that were written")


def write_manifest(
    target: Path, files: Sequence[FileRecord], check: FoldCheck, lineage: dict[str, Any]
) -> None:
    """Write `manifest.json`, which marks the directory as whole, and delete the journal."""
    content = {"files": [asdict(file) for file in files], "check": asdict(check), **lineage}
    write_json_atomic(target / MANIFEST, content)
    forget_journal(target)


def _save_config(opened: Opened, target: Path, dtype: torch.dtype) -> None:
    """As `save_pretrained` does; a head that has its own tensor now is saved as untied."""
    shell = opened.outline.pattern
    if not opened.tied:
        for config in (shell.config, shell.config.get_text_config()):
            config.tie_word_embeddings = False
    save_configs(shell, dtype, target)


def _identity(files: TensorFiles) -> list[list[object]]:
    """Names, sizes and times of the files: a fold of the same files may use the journal."""
    stats = [(file.name, file.stat()) for file in files.files]
    return [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]
