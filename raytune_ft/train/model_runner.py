"""A built model with everything that a forward pass needs."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from raytune_ft.config.objectives import Figure, figures
from raytune_ft.data.arrays import Indices
from raytune_ft.data.batch import (
    FREELY,
    Apart,
    MicroBatch,
    MicroLayout,
    collate,
    lay_out,
    prompts_in,
    shared_in,
)
from raytune_ft.data.split import TokenizedSplit, parts_of
from raytune_ft.model.attention import Examples, Varlen, all_seen, segment_inputs
from raytune_ft.model.critic import critic_of
from raytune_ft.model.heads import Reading, example_logits
from raytune_ft.model.load import Precision
from raytune_ft.model.methods.hooks import seeing, virtual_tokens
from raytune_ft.model.objectives import Objective, TokenObjective
from raytune_ft.model.objectives.tokens import OfLogits, label_blocks, label_logits
from raytune_ft.model.routers import Balance
from raytune_ft.strategy import Strategy


@contextmanager
def noisy_embeddings(model: nn.Module, batch: MicroBatch, alpha: float | None) -> Iterator[None]:
    """Add uniform noise of at most alpha / sqrt(tokens x width) to embeddings (arXiv 2310.05914).

    The tokens are those of the example, not of its row, so that packing does not change the size of
    the noise. Its values depend on the layout.
    """
    if alpha is None:
        yield
        return
    lengths_E = torch.tensor([float(span.stop - span.start) for span in batch.spans])
    size_BS = batch.by_token(alpha / lengths_E.sqrt())
    size_BS = size_BS.to(batch.tokens_BS.device, non_blocking=True)

    def add(module: nn.Module, arguments: Any, embedded: Tensor) -> Tensor:
        noise = torch.empty_like(embedded).uniform_(-1, 1) / embedded.shape[-1] ** 0.5
        return embedded + noise * size_BS.unsqueeze(-1).to(embedded.dtype)

    handle = model.get_input_embeddings().register_forward_hook(add)  # type: ignore[operator]
    try:
        yield
    finally:
        handle.remove()


T = TypeVar("T")
HOST = torch.device("cpu")
SUMMED_EXAMPLES = 1024
"""Laid out together, since the time of packing grows faster than its input."""
MICRO_TOKENS = {"cpu": 2048, "cuda": 16384}
"""`train.micro_tokens: auto`: enough tokens to fill the device, with small activations."""


@dataclass(frozen=True)
class ModelRunner:
    """`wrapped` is `model` as the strategy calls it.

    `names` are those of the trained weights in a single process. `by_example`: see
    `model.attention`; else a mask over the row keeps examples apart. `varlen`: how `by_example` is
    computed on a GPU. `flash`: transformers' flash attention keeps examples apart. `shares`: a
    packed row holds a prompt once for all sequences that begin with it. `figures` are those of an
    evaluation. `reading` is how a task head reads its examples, None where the model predicts
    tokens. `noise` is NEFTune's alpha. `apart` says which examples do not share a forward pass, and
    `balance` is the router loss of a mixture of experts. Logits of at most `block` label tokens are
    there at a time; None: of all of a batch. Packed rows are at most `row_limit` long, unless an
    example is longer. In the context `without_method` the model computes what its base does, where
    the base is in it.
    """

    model: nn.Module
    wrapped: nn.Module
    head: nn.Module | None
    names: list[str]
    strategy: Strategy
    precision: Precision
    pad_token: int
    micro_tokens: int
    packing: bool
    by_example: bool = False
    varlen: Varlen | None = None
    flash: bool = False
    shares: bool = False
    notes: tuple[str, ...] = ()
    objective: Objective = field(default_factory=TokenObjective)
    figures: tuple[Figure, ...] = figures("sft", trained=True)
    reading: Reading | None = None
    noise: float | None = None
    apart: Apart = FREELY
    balance: Balance | None = None
    block: int | None = None
    row_limit: int = 0
    without_method: Callable[[], AbstractContextManager[Any]] = nullcontext

    def example_logits(self, batch: MicroBatch) -> Tensor:
        """See `Forward.example_logits`."""
        assert self.reading is not None
        with self.autocast():
            return example_logits(self.wrapped, self.reading, self.inputs(batch), batch)

    def logits(self, batch: MicroBatch, keep_N: Tensor | None = None) -> Tensor:
        """`logits_NV` at the positions `keep_N`, by default those of the batch's labels."""
        keep_N = batch.labels_N if keep_N is None else keep_N
        with self.autocast(), seeing(self.model, batch):
            return label_logits(self.wrapped, self.head, self.inputs(batch), keep_N)

    def by_label(self, batch: MicroBatch, of: OfLogits) -> Tensor:
        """See `Forward.by_label`."""
        if self.block is None or len(batch.labels_N) <= self.block:
            return of(self.logits(batch), batch)
        assert self.head is not None
        with self.autocast(), seeing(self.model, batch):
            inputs = self.inputs(batch)
            return label_blocks(self.wrapped, self.head, inputs, batch, of, self.block)

    def with_values(self, batch: MicroBatch, of: OfLogits) -> tuple[Tensor, Tensor]:
        """See `Forward.with_values`. Raises ModelError where the critic cannot read the model."""
        critic = critic_of(self.model)
        assert critic is not None
        with critic.reading(batch.labels_N):
            return self.by_label(batch, of), critic.values_N

    @torch.no_grad()
    def summed(
        self, split: TokenizedSplit, indices: Indices, of: Callable[[MicroBatch], Tensor]
    ) -> Tensor:
        """See `Forward.summed`; a float64 number."""
        total = torch.zeros((), dtype=torch.float64, device=self.strategy.device)
        for start in range(0, len(indices), SUMMED_EXAMPLES):
            for batch in self.micro_batches(split, indices[start : start + SUMMED_EXAMPLES]):
                total += of(batch.to(self.strategy.device)).double()
        return self.strategy.sum(total)

    def inputs(self, batch: MicroBatch) -> dict[str, Any]:
        """The keyword arguments of the model's forward."""
        inputs: dict[str, Any] = batch.model_inputs()
        if self.flash:
            return inputs | segment_inputs(batch)
        if not self.by_example:
            return inputs
        # With a mask that hides nothing, transformers does not look for examples by itself.
        shape, device = tuple(batch.tokens_BS.shape), batch.tokens_BS.device
        inputs["attention_mask"] = all_seen(shape, device)
        return inputs | {"examples": batch.examples or Examples.of(batch, self.varlen)}

    def watched(self) -> AbstractContextManager[Any]:
        """Inside, `balance` sees the router logits of a forward pass."""
        return nullcontext() if self.balance is None else self.balance.watched()

    def balance_loss(self, batch: MicroBatch, shares_E: Sequence[float]) -> Tensor | float:
        """See `Balance.loss`; 0 without one."""
        return 0.0 if self.balance is None else self.balance.loss(batch, shares_E)

    def autocast(self) -> AbstractContextManager[Any]:
        """Matrix products in bfloat16 while trained weights stay in float32."""
        if self.precision != "bfloat16":
            return nullcontext()
        return torch.autocast(self.strategy.device.type, torch.bfloat16)

    @property
    def wide(self) -> int:
        """How long packed rows may be where attention is computed by example, as fits a pass."""
        return min(self.micro_tokens, self.row_limit) if self.by_example or self.flash else 0

    def widths(self, split: TokenizedSplit, indices: Indices) -> Indices:
        """The tokens of a row that each of these examples takes by itself."""
        if not self.packing:
            return split.longest_parts[indices]
        lengths_m = split.lengths[indices]
        if self.shares and split.parts > 1:
            prompts = prompts_in(split, parts_of(indices, split.parts))
            shared_Q, _ = shared_in(prompts, np.repeat(np.arange(len(indices)), split.parts))
            lengths_m = lengths_m - shared_Q.reshape(-1, split.parts).sum(1)
        return lengths_m

    def layout(self, split: TokenizedSplit, indices: Indices) -> list[MicroLayout]:
        """This rank's micro-batches of a step over these examples."""
        virtual, strategy = virtual_tokens(self.model), self.strategy
        ranks = lay_out(
            [length + virtual for length in split.part_lengths(indices)],
            strategy.world_size,
            self.micro_tokens,
            self.packing,
            self.apart,
            split.parts,
            self.wide,
            prompts_in(split, parts_of(indices, split.parts)) if self.shares else None,
        )
        return ranks[strategy.rank]

    def collate(self, split: TokenizedSplit, indices: Indices, layout: MicroLayout) -> MicroBatch:
        """See `data.batch.collate`."""
        return self.collate_on_host(split, indices, layout).to(self.strategy.device)

    def collate_on_host(
        self, split: TokenizedSplit, indices: Indices, rows: MicroLayout
    ) -> MicroBatch:
        """The same in host memory, from which it moves in the background."""
        virtual = virtual_tokens(self.model)
        batch = collate(split, indices, rows, self.pad_token, HOST, virtual, self.shares)
        if self.by_example:
            batch = replace(batch, examples=Examples.of(batch, self.varlen))
        return batch if self.strategy.device.type == "cpu" else batch.moved(Tensor.pin_memory)

    def micro_batches(self, split: TokenizedSplit, indices: Indices) -> list[MicroBatch]:
        """This rank's micro-batches of a step over `indices`, in host memory."""
        layout = self.layout(split, indices)
        return [self.collate_on_host(split, indices, rows) for rows in layout]

    def steps(
        self, split: TokenizedSplit, steps: Iterable[Indices]
    ) -> Generator[tuple[Indices, list[MicroBatch]]]:
        """Examples and micro-batches of each of `steps`, made while the step before is computed."""
        return ahead((indices, self.micro_batches(split, indices)) for indices in steps)


def choose_micro_tokens(configured: int | str, device: torch.device) -> int:
    """The token budget of one forward pass."""
    return configured if isinstance(configured, int) else MICRO_TOKENS.get(device.type, 2048)


def ahead(items: Iterator[T]) -> Generator[T]:
    """The same items; a thread makes each of them while the one before is used."""
    with ThreadPoolExecutor(1, thread_name_prefix="batches") as pool:
        coming = pool.submit(next, items, None)
        while (item := coming.result()) is not None:
            coming = pool.submit(next, items, None)
            yield item
