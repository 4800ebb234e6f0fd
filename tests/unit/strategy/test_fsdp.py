"""What ranks send each other, counted on a process group that sends nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from raytune_ft.config.schema import ParallelConfig
from raytune_ft.config.train import TrainConfig
from raytune_ft.strategy.base import Message
from raytune_ft.strategy.fsdp import Fsdp
from raytune_ft.train.optim import build_optimizer
from tests.support.models import FAMILIES
from tests.unit.estimate.test_memory import shell

WORKERS, PASSES, GROUPS = 4, 3, 3
"""Of collectives: two blocks, and the weights around them."""


@pytest.fixture
def group() -> Iterator[None]:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=WORKERS)
    yield
    dist.destroy_process_group()


class Sent(TorchDispatchMode):
    """Counts collectives by their names."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = Counter[str]()

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if op.namespace == "c10d":
            self.counts[op._opname] += 1
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("changes", "all_reduces"), [({}, 1), ({"offload": "all"}, PASSES)], ids=["device", "offloaded"]
)
def test_replicas_sum_gradients_once_a_step(
    group: None, changes: dict[str, str], all_reduces: int
) -> None:
    layout = {"strategy": "fsdp", "workers": WORKERS, "replicas": 2} | changes
    parallel = ParallelConfig.model_validate(layout)
    strategy = Fsdp(parallel, "float32")
    model = AutoModelForCausalLM.from_config(FAMILIES["llama"]())
    wrapped = strategy.prepare(model, lambda found: build_optimizer(found, TrainConfig()))
    for _ in range(2):
        with Sent() as sent:
            for number in range(PASSES):
                with strategy.accumulate(number == PASSES - 1):
                    logits = wrapped(input_ids=torch.arange(8).unsqueeze(0)).logits
                    strategy.backward(logits.square().mean())
        assert sent.counts["_reduce_scatter_base_"] == PASSES * GROUPS
        assert sent.counts["allreduce_"] == all_reduces * GROUPS
        strategy.step(1e-3, None)


def test_traffic_between_replicas_does_not_grow_with_passes() -> None:
    """As many messages as the test above counts."""

    def between(**changes: object) -> list[Message]:
        layout = {"strategy": "fsdp", "workers": WORKERS, "replicas": 2} | changes
        messages = Fsdp.traffic(shell(), ParallelConfig.model_validate(layout), PASSES).messages
        return [message for message in messages if message.across]

    assert [message.times for message in between()] == [1] * GROUPS
    assert [message.times for message in between(offload="all")] == [PASSES] * GROUPS
