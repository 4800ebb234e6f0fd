"""What copies of the model are sent, and how they are held to it; with files on disk."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from raytune_ft.config.methods import FullMethod, LoraMethod, MethodConfig
from raytune_ft.config.schema import ModelConfig, ParallelConfig
from raytune_ft.data.formats.prompt import Prompt
from raytune_ft.errors import RunFailed
from raytune_ft.model.export import Exporter
from raytune_ft.model.meta import build
from raytune_ft.model.sampling import Request, Said
from raytune_ft.rewards.pool import Rewards
from raytune_ft.strategy import build_strategy
from raytune_ft.strategy.side_channel import Alone
from raytune_ft.train.copies import Asked, Copies
from raytune_ft.train.speaker import Speaker, Voice
from tests.support.models import save_tiny_llama


@dataclass
class Listening:
    """A sampler that keeps what it is sent."""

    taken: list[dict[str, Any]] = field(default_factory=list)

    def take(self, folder: Path) -> None:
        (file,) = folder.glob("*.safetensors")
        self.taken.append(load_file(file))

    def say(self, asked: Asked) -> list[Said]:
        return [Said((1,), True, logps=(-1.0,)) for _ in asked.requests]


@pytest.mark.parametrize("method", [LoraMethod(rank=2), FullMethod(name="full")])
def test_weights_are_sent_when_they_have_changed(tmp_path: Path, method: MethodConfig) -> None:
    model = ModelConfig(path=str(save_tiny_llama(tmp_path / "model")))
    built = build(model, method, "float32", 0, False, None).model
    strategy = build_strategy("single", ParallelConfig(), "float32")
    exporter = Exporter(built, torch.float32)
    strategy.prepare(built, lambda named: torch.optim.SGD(named.values(), lr=0.5))
    names = [name for name, p in built.named_parameters() if p.requires_grad]
    heard = Listening()
    copies = Copies(heard, exporter, names, strategy, Alone())
    asked = Asked([Request((1, 2))], 4, 1.0, (), 0, 0)
    for step in range(3):
        for _ in range(2):
            assert copies.say(asked) == [Said((1,), True, logps=(-1.0,))]
        assert len(heard.taken) == step + 1
        first = built.get_parameter(names[0])
        assert any(torch.equal(first.detach(), tensor) for tensor in heard.taken[-1].values()), (
            names[0]
        )
        for parameter in built.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.ones_like(parameter)
        strategy.step(0.5, None)


def test_a_gap_of_log_probabilities_ends_the_run() -> None:
    prompts = [Prompt("rows.jsonl:1", (1, 2), (), {})]
    said = [[Said((3, 4), True, logps=(-1.0, -2.0))]]

    def gap_of(own: list[float]) -> float:
        speaker = Speaker.__new__(Speaker)
        speaker._voice = Voice(cast("Any", None), (), 1.0, Rewards(()), Alone())
        speaker.logps = lambda split, temperature: np.array(own)  # type: ignore[method-assign]
        return speaker.gap_of(prompts, said)

    assert gap_of([-1.02, -1.98]) == pytest.approx(0.02)
    for own in ([-1.06, -1.94], [float("nan"), -2.0]):
        with pytest.raises(RunFailed, match=r"sampled token is -1\.5000 .* 0\.05 is allow"):
            gap_of(own)
