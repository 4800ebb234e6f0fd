"""Trained weights that get no gradient from text, such as those of a vision tower."""

from __future__ import annotations

import torch
from torch import nn

from raytune_ft.model.load import Precision


def unreached(model: nn.Module, device: torch.device, precision: Precision) -> list[nn.Parameter]:
    """Trained weights on which the output for one token does not depend.

    They are read from the graph of a forward pass, without a backward.
    """
    token = torch.zeros((1, 1), dtype=torch.int64, device=device)
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
        output = model(input_ids=token, use_cache=False)
    waiting, seen, reached = [output.logits.grad_fn], set(), set()
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            reached.add(id(getattr(node, "variable", None)))
            waiting += [before for before, _ in node.next_functions]
    return [p for p in model.parameters() if p.requires_grad and id(p) not in reached]
