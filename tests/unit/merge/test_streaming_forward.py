"""Weights are given to every operation that takes them, whatever code calls it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from raytune_ft.merge import streaming_forward
from raytune_ft.merge.streaming_forward import Read, logits
from raytune_ft.model.meta import shapes_of

VOCABULARY, WIDTH = 20, 8


class Unusual(nn.Module):
    """Takes weights in the ways of recurrent layers, and of others that are no plain calls."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH, padding_idx=3)
        self.conv1d = nn.Conv1d(WIDTH, WIDTH, 3, groups=WIDTH, padding=2)
        self.decay = nn.Parameter(torch.randn(WIDTH))
        self.gates = nn.ParameterList([torch.randn(WIDTH), torch.randn(WIDTH)])
        self.experts = nn.Parameter(torch.randn(3, WIDTH, WIDTH))
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, input_ids: Tensor, use_cache: bool) -> Any:
        assert self.decay.device == input_ids.device
        x_BSD = self.embed(input_ids)
        # The weight of a layer inside, without calling that layer.
        weight = self.conv1d.weight.squeeze(1).unsqueeze(1)
        y_BDS = F.conv1d(x_BSD.mT, weight, self.conv1d.bias, padding=2, groups=WIDTH)
        x_BSD = y_BDS.mT[:, : x_BSD.shape[1]] * -torch.exp(self.decay.float())
        x_BSD = x_BSD * torch.stack([gate.sigmoid() for gate in self.gates]).sum(0)
        for number in range(self.experts.shape[0]):
            x_BSD = x_BSD + x_BSD @ self.experts[number]
        return SimpleNamespace(logits=self.head(x_BSD))


@pytest.mark.parametrize("chunk", [1 << 22, 30])
def test_logits(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    """A small chunk makes head and embedding wide, which are read in parts."""
    monkeypatch.setattr(streaming_forward, "CHUNK", chunk)
    torch.manual_seed(0)
    model = Unusual()
    weights = dict(model.named_parameters())
    longest = 0

    def find(name: str) -> Read:
        def rows(start: int, end: int) -> Tensor:
            nonlocal longest
            if name in ("embed.weight", "head.weight"):
                longest = max(longest, end - start)
            return weights[name].detach()[start:end]

        return Read(tuple(weights[name].shape), rows)

    rows = [torch.tensor([3, 1, 4, 1, 5]), torch.tensor([9, 2])]
    found = logits(shapes_of(model), find, rows)
    expected = torch.cat([model(ids[None], use_cache=False).logits[0] for ids in rows])
    torch.testing.assert_close(found, expected.detach())
    assert longest == (VOCABULARY if chunk > VOCABULARY * WIDTH else chunk // WIDTH)
