"""Noise on embeddings while training (NEFTune, arXiv 2310.05914)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from raytune_ft.data.batch import MicroBatch


@contextmanager
def noisy_embeddings(model: nn.Module, batch: MicroBatch, alpha: float | None) -> Iterator[None]:
    """Inside, embeddings get uniform noise of at most alpha / sqrt(tokens x width).

    The tokens are those of the example, not of its row, so that packing does not change how much
    noise there is; which noise it is depends on the layout.
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
