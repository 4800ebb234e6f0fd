"""No pass of a step makes the host wait for the device.

Tensors of the device "meta" have shapes and no data: what would read one on the host fails, and so
does a copy that is not made in the background.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from raytune_ft.config.methods import LoraMethod, PromptMethod
from raytune_ft.config.schema import ModelConfig, ParallelConfig
from raytune_ft.data.split import TokenizedSplit
from raytune_ft.model.attention import attend_by_example
from raytune_ft.model.load import build_model, load_base
from raytune_ft.model.meta import shapes_of
from raytune_ft.model.objectives import TokenObjective
from raytune_ft.packed.engine import accumulate_packed
from raytune_ft.packed.lora import ActiveAdapters, MultiLora, init_adapter
from raytune_ft.packed.slot import OpenStep
from raytune_ft.strategy.single import Single
from raytune_ft.train.loop import accumulate_gradients
from raytune_ft.train.material import Work
from raytune_ft.train.model_runner import ModelRunner, ahead
from tests.support.models import save_tiny_llama

CHOSEN = [LoraMethod(rank=2), PromptMethod(name="prompt", tokens=5)]
DEVICE = torch.device("meta")
INDICES = np.arange(6)


class Waited(Exception):
    """The host waited for the device."""


class NeverWaits(TorchDispatchMode):
    """Refuses copies between host and device that are not in the background."""

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        found = op(*args, **kwargs)
        name = op._opname
        if name == "_local_scalar_dense":
            raise Waited(str(op))
        if name in ("_to_copy", "copy_"):
            source = args[1] if name == "copy_" else args[0]
            target = args[0] if name == "copy_" else found
            moves = source.device.type != target.device.type
            background = kwargs.get("non_blocking", args[2] if len(args) > 2 else False)
            if moves and not (background and target.device.type == "meta"):
                raise Waited(str(op))
        return found


@pytest.mark.parametrize(
    "waits",
    [
        lambda tensor: tensor.sum().item(),
        lambda tensor: tensor[tensor > 0],
        lambda tensor: tensor + torch.ones(2).to(DEVICE),
        lambda tensor: tensor.copy_(torch.ones(2)),
        lambda tensor: tensor.cpu(),
    ],
)
def test_waiting_is_seen(waits: Callable[[Tensor], Any]) -> None:
    with NeverWaits(), pytest.raises((Waited, RuntimeError)):
        waits(torch.ones(2, device=DEVICE))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("tiny") / "model")


def _split() -> TokenizedSplit:
    rng = np.random.default_rng(0)
    examples = [rng.integers(3, 90, length).astype(np.int32) for length in (5, 40, 9, 17, 33, 8)]
    return TokenizedSplit.from_examples(
        [(ids, np.arange(len(ids)) > len(ids) // 2) for ids in examples],
        {"weight": np.linspace(0.5, 1.5, 6, dtype=np.float32)[:, None]},
    )


def _runner(built: nn.Module, packing: bool) -> ModelRunner:
    """As `build_runner` makes it, without its probes, which read what they compute."""
    strategy = Single(ParallelConfig(), "float32")
    strategy.device = DEVICE
    model: Any = built
    return ModelRunner(
        model=built,
        wrapped=built,
        head=model.get_output_embeddings(),
        names=[],
        strategy=strategy,
        precision="float32",
        pad_token=0,
        micro_tokens=64,
        packing=packing,
        by_example=attend_by_example(built, True),
        objective=TokenObjective(label_smoothing=0.1),
        noise=5.0,
    )


@pytest.fixture
def pinned(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """What was moved to pinned memory, which takes a GPU."""
    found: list[Tensor] = []
    monkeypatch.setattr(Tensor, "pin_memory", lambda tensor: found.append(tensor) or tensor)
    return found


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("method", CHOSEN, ids=lambda each: each.name)
def test_a_step_of_a_run(model: Path, pinned: list[Tensor], packing: bool, method: Any) -> None:
    runner = _runner(build_model(ModelConfig(path=str(model)), method, "float32", 0), packing)
    split = _split()
    batches = runner.micro_batches(split, INDICES)
    assert len(batches) > 1
    assert len(pinned) >= 5 * len(batches)
    runner.model.to(DEVICE)
    with NeverWaits():
        loss_sum, _ = accumulate_gradients(runner, Work.of(split, INDICES, batches))
    assert loss_sum.device.type == "meta"
    assert all(p.grad is not None for p in runner.model.parameters() if p.requires_grad)


def test_a_pass_over_slots(model: Path, pinned: list[Tensor]) -> None:
    base = load_base(ModelConfig(path=str(model)), torch.float32).requires_grad_(False)
    adapter = init_adapter(shapes_of(base), LoraMethod(rank=2), "float32", 0)
    stack = MultiLora(base, 2, in_place=True)
    stack.adapt(list(adapter.layers))
    runner = _runner(base, packing=True)
    batch = runner.collate_on_host(_split(), INDICES, ((1,), (0, 2, 3)))
    base.to(DEVICE)
    numbers_GN, gradients_GN = (torch.zeros(2, stack.numbers, device=DEVICE) for _ in range(2))
    scales_G = torch.ones(2, device=DEVICE)
    active = ActiveAdapters(stack.slices, numbers_GN, gradients_GN, scales_G, 2, torch.float32)
    split, objective = _split(), TokenObjective()
    parts = (np.array(own, np.int64) for own in ([1], [0, 2, 3]))
    steps = [OpenStep(Work.of(split, own, ()), split.lengths[own], objective) for own in parts]
    with NeverWaits():
        sums_G = accumulate_packed(runner, stack, active, batch.to(DEVICE), steps)
    assert (sums_G.device.type, sums_G.shape) == ("meta", (2,))


def test_a_step_is_made_while_the_one_before_is_used() -> None:
    made: list[int] = []
    used = threading.Event()

    def numbers() -> Iterator[int]:
        for number in range(3):
            made.append(number)
            if number == 1:
                assert used.wait(60)
            yield number

    coming = ahead(numbers())
    assert next(coming) == 0
    used.set()  # number 1 waits for this, so that it does not hold up number 0
    assert list(coming) == [1, 2]
    assert made == [0, 1, 2]


def test_what_breaks_in_the_thread_breaks_the_step() -> None:
    def broken() -> Iterator[int]:
        yield 0
        raise RuntimeError("no such row")

    coming = ahead(broken())
    assert next(coming) == 0
    with pytest.raises(RuntimeError, match="no such row"):
        next(coming)
