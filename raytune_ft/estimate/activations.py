"""Memory of activations, from a trace of one and two blocks of a model on fake tensors.

Fake tensors have shapes and no data, so that operators, casts and kernels are those of a real step.
Every storage is counted from its allocation until it is freed.
"""

from __future__ import annotations

import copy
import logging
import weakref
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from raytune_ft.config.train import KdConfig
from raytune_ft.estimate.parameters import Shell
from raytune_ft.model.blocks import find_blocks
from raytune_ft.model.checkpointing import Activations, checkpoint_activations
from raytune_ft.model.load import stay_in_bfloat16
from raytune_ft.model.methods import leave_casts_to_autocast
from raytune_ft.model.objectives.distillation import divergence

T = TypeVar("T")
# Errors of models that cannot run on fake tensors, since they use values or unknown operators.
_CANNOT = (RuntimeError, TypeError, ValueError, AttributeError, LookupError, AssertionError)


@dataclass(frozen=True)
class Plane:
    """Bytes as a function of rows and blocks, inter- and extrapolated from traced points.

    It is linear in blocks. In rows the true function is convex, so that the interpolation between
    two points is an upper bound.
    """

    points: dict[tuple[int, int], int]

    def at(self, rows: int, blocks: int) -> int:
        """Bytes for a micro-batch of `rows` rows through `blocks` blocks."""
        low, high = min(r for r, _ in self.points), max(r for r, _ in self.points)
        left = self._blocks(low, blocks)
        if low == high:
            return round(left * rows / low)
        slope = (self._blocks(high, blocks) - left) / (high - low)
        return max(0, round(left + slope * (rows - low)))

    def _blocks(self, rows: int, blocks: int) -> int:
        one, two = self.points[rows, 1], self.points[rows, 2]
        return one + (two - one) * (blocks - 1)


@dataclass(frozen=True)
class Traced:
    """Bytes for rows of `width` tokens: `kept` at the end of the forward, `peak` at any time until
    the end of the blocks' backward.

    `exact` is false where the model could not be traced and a formula was used.
    """

    width: int
    kept: Plane
    peak: Plane
    exact: bool = True


def trace(
    shell: Shell,
    rows: Collection[int],
    width: int,
    checkpointing: Activations,
    gathered: bool = False,
) -> Traced:
    """Run micro-batches of the smallest and largest of `rows` through one and two blocks.

    `gathered`: a strategy gathers weights in the dtype of matrix products.
    """
    kept, peak = {}, {}
    ends = {min(rows), max(rows)}
    for blocks in (1, 2) if len(shell.blocks) > 1 else (1,):
        for count in ends:
            point = _once(_run, shell, count, blocks, width, checkpointing, gathered)
            if point is None:
                return by_formula(shell, ends, width, checkpointing)
            kept[count, blocks], peak[count, blocks] = point
    for found in (kept, peak):
        for count in ends:
            found.setdefault((count, 2), 2 * found[count, 1])
    return Traced(width, Plane(kept), Plane(peak))


def _once(run: Callable[..., T], shell: Shell, *how: Any) -> T | None:
    """`run(shell, *how)`, or what it gave before; None for a model that fake tensors cannot run."""
    key = (run, *how)
    if key not in shell.traces:
        try:
            shell.traces[key] = run(shell, *how)
        except _CANNOT:
            shell.traces[key] = None
    found: T | None = shell.traces[key]
    return found


def by_formula(shell: Shell, ends: set[int], width: int, checkpointing: Activations) -> Traced:
    """34 bytes per token and hidden unit in 16 bits (Korthikanti et al., arXiv 2205.05198)."""
    unit = width * shell.hidden * shell.compute
    each = {"none": 17, "selective": 11, "full": 1}[checkpointing] * unit
    kept = {(rows, blocks): rows * each * blocks for rows in ends for blocks in (1, 2)}
    peak = {at: bytes_ + at[0] * 17 * unit for at, bytes_ in kept.items()}
    return Traced(width, Plane(kept), Plane(peak), exact=False)


class _Follow(TorchDispatchMode):
    """Counts the bytes of storages from their allocation by an operator until they are freed."""

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._live: dict[int, Any] = {}
        for tensor in known:
            self._see(tensor.untyped_storage(), counts=False)

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: Any = (), named: Any = None
    ) -> Any:
        result = function(*arguments, **(named or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._see(leaf.untyped_storage(), counts=True)
        return result

    def _see(self, storage: torch.UntypedStorage, counts: bool) -> None:
        key, size = id(storage), storage.nbytes() if counts else 0
        if key in self._live:
            return

        def dropped(_: Any) -> None:
            self.now -= size
            del self._live[key]

        self._live[key] = weakref.ref(storage, dropped)
        self.now += size
        self.peak = max(self.peak, self.now)


def _cut(module: nn.Module, blocks: int) -> nn.Module:
    """A copy with the largest `blocks` of its blocks."""
    found = find_blocks(module)
    order = sorted(found, key=lambda name: -sum(p.numel() for p in found[name].parameters()))
    kept = set(order[:blocks])
    containers = {name.rpartition(".")[0] for name in found}
    originals = {name: module.get_submodule(name)._modules for name in containers}
    try:
        for name, children in originals.items():
            left = [c for key, c in children.items() if f"{name}.{key}" in kept]
            numbered = {str(number): child for number, child in enumerate(left)}
            module.get_submodule(name)._modules = numbered
        cut = copy.deepcopy(module)
    finally:
        for name, children in originals.items():
            module.get_submodule(name)._modules = children
    return cut


def _run(
    shell: Shell,
    rows: int,
    blocks: int,
    width: int,
    checkpointing: Activations,
    gathered: bool,
) -> tuple[int, int]:
    """Bytes at the end of the forward, and the peak.

    Embeddings and head are frozen here: their gradients do not exist at the same time as the
    activations of blocks, and are counted separately.
    """
    module = _cut(shell.module, blocks)
    checkpoint_activations(module, checkpointing)
    if shell.precision == "bfloat16":
        leave_casts_to_autocast(module)
        stay_in_bfloat16(module)
    _set_dtypes(module, shell, gathered)
    with _fake():
        _fill(module)
        inside = {id(p) for block in find_blocks(module).values() for p in block.parameters()}
        embedding, head = _ends(module)
        if head is not None:
            head.forward = lambda hidden_BSH: hidden_BSH  # the head is traced separately
        if any(p.requires_grad for p in embedding.parameters()):
            embedding.register_forward_hook(lambda *seen: seen[2].requires_grad_(True))
        for parameter in module.parameters():
            parameter.requires_grad_(parameter.requires_grad and id(parameter) in inside)
            if parameter.requires_grad:
                parameter.grad = torch.empty_like(parameter)
        if head is not None:
            head.register_forward_pre_hook(lambda _, arguments: (arguments[0][:1, :1],))
        tokens_BS = torch.zeros((rows, width), dtype=torch.int64)
        mask = torch.ones((rows, 1, width, width), dtype=torch.bool)
        known = [*module.parameters(), *(p.grad for p in module.parameters() if p.grad is not None)]
        with _Follow(known) as follow:
            with _autocast(shell):
                output = module(input_ids=tokens_BS, attention_mask=mask, use_cache=False).logits
            loss = output.float().sum()
            del output
            kept = follow.now
            loss.backward()
        return kept, follow.peak


def trace_head(
    shell: Shell, labels: int, gathered: bool = False, kd: KdConfig | None = None
) -> int:
    """Peak bytes of forward and backward of the loss of `labels` label tokens.

    With `kd`, the teacher's logits are held too, and the divergence from them is part of the loss.
    """
    if _ends(shell.module)[1] is None:  # logits of a task head are small
        return 0
    found = _once(_run_head, shell, labels, gathered, kd)
    return head_by_formula(shell, labels, kd) if found is None else found


def head_by_formula(shell: Shell, labels: int, kd: KdConfig | None) -> int:
    """Three copies of logits in float32; eight with those of a teacher."""
    return (12 if kd is None else 32) * labels * shell.vocabulary


def _run_head(shell: Shell, labels: int, gathered: bool, kd: KdConfig | None) -> int:
    head: Any = copy.deepcopy(_ends(shell.module)[1])
    _set_dtypes(head, shell, gathered)
    with _fake():
        _fill(head)
        for parameter in head.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.empty_like(parameter)
        dtype = torch.float64 if shell.precision == "float64" else torch.float32
        hidden_NH = torch.empty((labels, shell.hidden), dtype=dtype, requires_grad=True)
        targets_N = torch.zeros(labels, dtype=torch.int64)
        known = [*head.parameters(), *(p.grad for p in head.parameters() if p.grad is not None)]
        with _Follow([*known, hidden_NH]) as follow:
            with _autocast(shell):
                logits_NV = head(hidden_NH)
            logits_NV = logits_NV if dtype == torch.float64 else logits_NV.float()
            losses_N = F.cross_entropy(logits_NV, targets_N, reduction="none")
            if kd is not None:
                teacher_NV = torch.empty(logits_NV.shape, dtype=dtype)
                losses_N = losses_N + divergence(logits_NV, teacher_NV, kd)
                del teacher_NV
            loss = losses_N.sum()
            del logits_NV, losses_N
            loss.backward()
        return follow.peak


@contextmanager
def _fake() -> Iterator[None]:
    log = logging.getLogger("torch._subclasses.fake_tensor")  # a traceback for what cannot be run
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        with FakeTensorMode(), torch.enable_grad():
            yield
    finally:
        log.setLevel(level)


def _set_dtypes(module: nn.Module, shell: Shell, gathered: bool) -> None:
    master = torch.float64 if shell.precision == "float64" else torch.float32
    compute = getattr(torch, shell.precision)
    for parameter in module.parameters():
        held = master if parameter.requires_grad else shell.frozen_dtype
        parameter.data = parameter.data.to(compute if gathered else held)


def _fill(module: nn.Module) -> None:
    """Move weights from the meta device to a fake `cpu`, which has autocast and real kernels."""
    module._apply(lambda t: torch.empty(t.shape, dtype=t.dtype, device="cpu"))


def _ends(module: Any) -> tuple[nn.Module, nn.Module | None]:
    return module.get_input_embeddings(), module.get_output_embeddings()


def _autocast(shell: Shell) -> Any:
    if shell.precision != "bfloat16":
        return nullcontext()
    return torch.autocast("cpu", torch.bfloat16)
