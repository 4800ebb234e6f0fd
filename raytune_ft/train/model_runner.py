"""A built model with everything that a forward pass needs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from raytune_ft.config.objectives import Figure, figures
from raytune_ft.data.batch import FREELY, Apart, MicroBatch, MicroLayout, collate, lay_out
from raytune_ft.data.order import Indices
from raytune_ft.data.split import TokenizedSplit
from raytune_ft.model.attention import Examples, Varlen, segment_inputs
from raytune_ft.model.heads import Reading, example_logits
from raytune_ft.model.load import Precision
from raytune_ft.model.methods.hooks import seeing, virtual_tokens
from raytune_ft.model.objectives import Objective, TokenObjective
from raytune_ft.model.objectives.tokens import label_logits, label_positions
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
    size_BS = batch.by_token(alpha / lengths_E.sqrt()).to(batch.tokens_BS.device)

    def add(module: nn.Module, arguments: Any, embedded: Tensor) -> Tensor:
        noise = torch.empty_like(embedded).uniform_(-1, 1) / embedded.shape[-1] ** 0.5
        return embedded + noise * size_BS.unsqueeze(-1).to(embedded.dtype)

    handle = model.get_input_embeddings().register_forward_hook(add)  # type: ignore[operator]
    try:
        yield
    finally:
        handle.remove()


MICRO_TOKENS = {"cpu": 2048, "cuda": 16384}
"""`train.micro_tokens: auto`: enough tokens to fill the device, with small activations."""


@dataclass(frozen=True)
class ModelRunner:
    """`wrapped` is `model` as the strategy calls it.

    `names` are those of the trained weights in a single process. `by_example`: see
    `model.attention`; else a mask over the row keeps examples apart. `varlen`: how `by_example` is
    computed on a GPU. `flash`: transformers' flash attention keeps examples apart. `figures` are
    those of an evaluation. `reading` is how a task head reads its examples, None where the model
    predicts tokens. `noise` is NEFTune's alpha. `apart` says which examples do not share a forward
    pass, and `balance` is the router loss of a mixture of experts.
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
    notes: tuple[str, ...] = ()
    objective: Objective = field(default_factory=TokenObjective)
    figures: tuple[Figure, ...] = figures("sft", trained=True)
    reading: Reading | None = None
    noise: float | None = None
    apart: Apart = FREELY
    balance: Balance | None = None

    def example_logits(self, batch: MicroBatch) -> Tensor:
        """See `Forward.example_logits`."""
        assert self.reading is not None
        with self.autocast():
            return example_logits(self.wrapped, self.reading, self.inputs(batch), batch)

    def logits(self, batch: MicroBatch, keep_BS: Tensor | None = None) -> Tensor:
        """`logits_NV` at `keep_BS`, by default at the label positions of the batch."""
        keep_BS = label_positions(batch) if keep_BS is None else keep_BS
        with self.autocast(), seeing(self.model, batch):
            return label_logits(self.wrapped, self.head, self.inputs(batch), keep_BS)

    def inputs(self, batch: MicroBatch) -> dict[str, Any]:
        """The keyword arguments of the model's forward."""
        inputs: dict[str, Any] = batch.model_inputs()
        if self.flash:
            return inputs | segment_inputs(batch)
        if not self.by_example:
            return inputs
        # With a mask that hides nothing, transformers does not look for examples by itself.
        inputs["attention_mask"] = torch.ones_like(batch.tokens_BS)
        return inputs | {"examples": Examples.of(batch, self.varlen)}

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

    def layout(self, lengths: Sequence[int]) -> list[MicroLayout]:
        """This rank's micro-batches of a step with examples of these lengths."""
        virtual = virtual_tokens(self.model)
        lengths = [length + virtual for length in lengths] if virtual else lengths
        strategy = self.strategy
        ranks = lay_out(lengths, strategy.world_size, self.micro_tokens, self.packing, self.apart)
        return ranks[strategy.rank]

    def collate(self, split: TokenizedSplit, indices: Indices, layout: MicroLayout) -> MicroBatch:
        """See `data.batch.collate`."""
        virtual = virtual_tokens(self.model)
        return collate(split, indices, layout, self.pad_token, self.strategy.device, virtual)


def choose_micro_tokens(configured: int | str, device: torch.device) -> int:
    """The token budget of one forward pass."""
    return configured if isinstance(configured, int) else MICRO_TOKENS.get(device.type, 2048)
