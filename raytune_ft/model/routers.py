"""The loss on the balance of experts of a mixture, where the model asks for it.

transformers computes it from all tokens of a batch, so that it would depend on the layout. Here it
is that of every example alone, by the model's own function, and its mean over the examples of a
step is added to the loss.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from peft import PeftModel
from torch import Tensor, nn

from raytune_ft.data.batch import MicroBatch


@dataclass(frozen=True)
class Balance:
    """`weight` of the loss `of` router logits `[N, experts]` of all layers. `seen` holds those of a
    forward pass inside `watched`.
    """

    model: nn.Module
    weight: float
    of: Callable[[tuple[Tensor, ...], int, int], Tensor]
    chosen: int
    seen: list[tuple[Tensor, ...]] = field(default_factory=list)

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Inside, the router logits of the model's forward are kept."""

        def keep(module: nn.Module, arguments: Any, output: Any) -> None:
            self.seen[:] = [output.router_logits]

        handle = self.model.register_forward_hook(keep)
        try:
            yield
        finally:
            handle.remove()

    def loss(self, batch: MicroBatch, shares_E: Sequence[float]) -> Tensor:
        """The sum over the examples of the batch, each times its share."""
        (layers,) = self.seen
        self.seen.clear()
        width = batch.tokens_BS.shape[1]
        total = layers[0].sum() * 0.0  # of a pass without examples
        for span, share in zip(batch.spans, shares_E, strict=True):
            tokens = slice(span.row * width + span.start, span.row * width + span.stop)
            own = tuple(layer.flatten(0, -2)[tokens] for layer in layers)
            total = total + share * self.of(own, own[0].shape[-1], self.chosen)
        return self.weight * total


def router_notes(model: Any) -> tuple[str, ...]:
    """What `plan` and a run say of this loss."""
    if not getattr(model.config.get_text_config(), "output_router_logits", False):
        return ()
    found = balance_of(model)
    asked = "the model asks for a router loss (output_router_logits: true)"
    if found is None:
        return (f"{asked}, which is left out, because it would depend on the layout",)
    return (
        f"{asked}: {found.weight:g} times that of every example alone is trained, and is no part "
        "of the losses that are reported",
    )


def balance_of(model: Any) -> Balance | None:
    """The loss that the model's configuration asks for; None where it asks for none, or where it is
    computed in a way of its own.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    text = base.config.get_text_config()
    weight = getattr(text, "router_aux_loss_coef", None)
    chosen = getattr(text, "num_experts_per_tok", None)
    modules = (sys.modules[each.__module__] for each in type(base).__mro__)  # sharding derives one
    found = (getattr(module, "load_balancing_loss_func", None) for module in modules)
    of = next(filter(None, found), None)
    if not (getattr(text, "output_router_logits", False) and weight and chosen and of):
        return None
    return Balance(model, weight, of, chosen)
