"""Completions by copies of the model in other processes: what these are sent.

A copy is sent the files of a checkpoint's export, an adapter or a model, before it samples with
weights that have changed. Whether it really uses them shows in the log-probabilities that it gives:
see `train.speaker`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Protocol

import torch
from torch import Tensor

from raytune_ft.errors import RunFailed
from raytune_ft.model.export import Exporter
from raytune_ft.model.sampling import Request, Said
from raytune_ft.strategy import Strategy
from raytune_ft.strategy.side_channel import SideChannel, on_all_ranks


@dataclass(frozen=True)
class Asked:
    """Requests to copies: up to `limit` tokens each, until one of `ends`. `pad` stands for a prompt
    without a token.
    """

    requests: Sequence[Request]
    limit: int
    temperature: float
    ends: Sequence[int]
    pad: int
    seed: int


class Sampler(Protocol):
    """Copies of the model that sample. Rank 0 alone calls it."""

    def take(self, folder: Path) -> None:
        """Sample from now on with what `Exporter` left in this folder, which is deleted then."""

    def say(self, asked: Asked) -> list[Said]:
        """Continuations in the order of the requests, with the log-probability of each token.

        Raises:
            RunFailed: the copies are lost, or refuse.
        """


@dataclass
class Copies:
    """Sends weights to a sampler when they have changed, and has it answer for all ranks."""

    sampler: Sampler
    exporter: Exporter
    names: Sequence[str]
    strategy: Strategy
    channel: SideChannel
    _sent: int | None = field(default=None, init=False)

    def say(self, asked: Asked) -> list[Said]:
        """Every rank calls this at once, and gets the same.

        Raises:
            RunFailed: see `Sampler.say`.
        """
        weights: dict[str, Tensor] = {}
        if self._sent != self.strategy.steps:
            for name in self.names:
                weight = whole(self.strategy, name)
                if self.channel.rank == 0:
                    weights[name] = weight.cpu()

        def ask() -> list[Said] | None:
            if self.channel.rank > 0:
                return None
            if weights:
                with TemporaryDirectory(prefix="raytune-ft-") as folder:
                    self.exporter.save(weights.__getitem__, Path(folder), 0, 1)
                    weights.clear()
                    self.sampler.take(Path(folder))
            return self.sampler.say(asked)

        found = on_all_ranks(self.channel, ask, RunFailed)[0]
        self._sent = self.strategy.steps
        assert found is not None
        return found


def whole(strategy: Strategy, name: str) -> Tensor:
    """A copy of a trained weight in its whole shape; every rank calls this at once."""
    part = strategy.parts(name)[""]
    values = torch.zeros(math.prod(part.shape), dtype=part.values.dtype, device=strategy.device)
    if part.writes:
        values[part.start : part.end] = part.values
    return strategy.sum(values).view(part.shape)
