"""Is packing exact for this model? Asked of the built model, not of a list of names."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from raytune_ft.data.batch import MicroBatch, Span
from raytune_ft.model.build import Precision

Logits = Callable[[MicroBatch], Tensor]
"""A batch to its logits `[tokens, V]`, all positions in row order."""

# Two documents in one row against the two alone, relative to the spread of the logits. A leak of
# attention or a wrong position moves them by tenths; rounding stays far below these bounds.
TOLERANCE: dict[Precision, float] = {"float64": 1e-9, "float32": 1e-4, "bfloat16": 5e-2}


def probe_packing(
    logits: Logits, vocabulary: int, precision: Precision, device: torch.device
) -> str | None:
    """None where a packed row computes what its documents compute alone, else the reason.

    Two questions: do both documents keep their logits (positions, virtual tokens), and does the
    second stay the same when the first one is exchanged (attention across documents)? The second
    is a sharp instrument even where bfloat16 blunts the first.
    """
    rng = np.random.default_rng(0)
    first, other, second = (rng.integers(0, vocabulary, size) for size in (7, 7, 9))
    with torch.no_grad():
        alone = torch.cat([logits(_row([first], device)), logits(_row([second], device))])
        packed = logits(_row([first, second], device))
        exchanged = logits(_row([other, second], device))
    spread = alone.std().item() or 1.0
    moved = (packed - alone).abs().max().item() / spread
    leaked = (packed[len(first) :] - exchanged[len(first) :]).abs().max().item() / spread
    # Written so that NaN counts as a failure.
    if not leaked <= TOLERANCE[precision] / 10:
        return f"tokens attend across examples (logits move by {leaked:.1e} of their spread)"
    if not moved <= TOLERANCE[precision]:
        return f"positions in a packed row differ (logits move by {moved:.1e} of their spread)"
    return None


def _row(documents: list[np.ndarray], device: torch.device) -> MicroBatch:
    tokens_BS = torch.from_numpy(np.concatenate(documents)).to(device)[None]
    positions_BS = torch.cat([torch.arange(len(d), device=device) for d in documents])[None]
    stops = np.cumsum([len(document) for document in documents])
    return MicroBatch(
        tokens_BS,
        tokens_BS.clone(),
        positions_BS if len(documents) > 1 else None,
        None,
        tuple(
            Span(0, int(stop) - len(document), int(stop), index)
            for index, (document, stop) in enumerate(zip(documents, stops, strict=True))
        ),
    )
