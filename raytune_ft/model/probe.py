"""Tests of a built model: whether packing is exact on it and whether it is causal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from raytune_ft.data.batch import Apart, MicroBatch, MicroLayout, collate, lay_out
from raytune_ft.data.split import TokenIds, TokenizedSplit
from raytune_ft.model.critic import critic_of
from raytune_ft.model.load import Precision

Logits = Callable[[MicroBatch, Tensor], Tensor]
"""From a batch and positions `keep_N` of its rows end to end to their logits `[N, V]`."""

# Largest difference between packed and single documents, relative to the spread of the logits. A
# leak of attention or a wrong position changes logits by tenths; rounding is far below the bounds.
TOLERANCE: dict[Precision, float] = {"float64": 1e-9, "float32": 1e-4, "bfloat16": 5e-2}
NOISE_RATIO, NOISE_LIMIT = 3.0, 0.1
"""In bfloat16 kernels choose their order of sums by shape, and a deep model amplifies that beyond
the bound above. So packed rows may also differ by this many times what padding alone changes, as a
root mean square, up to this share of the spread; wrong positions change more."""
LENGTHS = (7, 9, 5)
"""Of documents that are packed in two rows, since some attention code packs a single row only; the
last document has a row to itself, with padding."""
READ = max(LENGTHS)
"""How many logits are read at the end of a document, which bounds their memory."""


@dataclass(frozen=True)
class Probe:
    """Tests of the logits of documents that are drawn, always the same ones.

    `virtual`: see `collate`.
    """

    logits: Logits
    vocabulary: int
    precision: Precision
    device: torch.device
    virtual: int = 0

    def against_packing(
        self,
        longest: int = LENGTHS[-1],
        thresholds: Sequence[int] = (),
        shared: bool = False,
    ) -> str | None:
        """Why packed rows compute something else than single documents, None where they do not.

        Two tests: every document keeps its logits (positions, virtual tokens), and the others keep
        theirs when the first one is exchanged (attention across documents). The second is sensitive
        even in bfloat16, where rounding limits the first, which is compared with what padding
        changes. Both are made with rows on either side of each of `thresholds`, of documents of up
        to `longest` tokens. `shared`: the documents begin with a prompt that a row holds once.
        """
        tried: list[tuple[int, ...]] = [LENGTHS]
        for threshold in thresholds:
            full = min(threshold, longest)
            tried.append((full,) * (threshold // full + 2))
            if threshold < longest:
                tried.append((threshold + 1,) * 3)
        return next(filter(None, (self._against_packing(each, shared) for each in tried)), None)

    def keeps_lengths(self, lengths: Sequence[int], apart: Apart) -> bool:
        """Whether documents of these lengths keep their logits in padded micro-batches."""
        documents = self._drawn(lengths)
        whole = [length + self.virtual for length in lengths]
        layouts = lay_out(whole, 1, len(lengths) * max(whole), False, apart)[0]
        alone = [self._of(documents, (row,)) for layout in layouts for row in layout]
        padded = torch.cat([self._of(documents, layout) for layout in layouts])
        moved = (padded - torch.cat(alone)).abs().max().item()
        return bool(moved <= TOLERANCE[self.precision] * (padded.std().item() or 1.0))

    def is_causal(self) -> bool:
        """Whether the logits before the last token of a document do not depend on that token.

        Where they do, tokens see their own targets, and training would reach a loss of 0 by
        copying.
        """
        (document,) = self._drawn(LENGTHS[:1])
        other = document.copy()
        other[-1] = (other[-1] + 1) % self.vocabulary
        one, two = (self._of([ids], ((0,),))[:-1] for ids in (document, other))
        spread = one.std().item() or 1.0
        return bool((one - two).abs().max().item() / spread <= TOLERANCE[self.precision] / 10)

    def _against_packing(self, lengths: Sequence[int], shared: bool) -> str | None:
        *others, last = range(len(lengths))
        layout = (tuple(others), (last,))
        drawn = self._drawn((*lengths, lengths[0]))
        prompt = (min(lengths) + 1) // 2 if shared else 0
        for document in drawn:
            document[:prompt] = drawn[0][:prompt]
        documents, other = drawn[:-1], [drawn[-1], *drawn[1:-1]]
        alone = torch.cat([self._of(documents, ((i,),), prompt) for i in range(len(documents))])
        packed, exchanged = (self._of(each, layout, prompt) for each in (documents, other))
        rows = tuple((i,) for i in range(len(documents)))
        padded = self._of(documents, rows, prompt) if self.precision == "bfloat16" else alone
        if packed.shape != alone.shape:
            return "its head reads whole rows, not the examples in them"
        own = len(self._of(documents, ((0,),), prompt))
        spread = alone.std().item() or 1.0
        moved = (packed - alone).abs().max().item() / spread
        leaked = (packed - exchanged)[own:].abs().max().item() / spread
        # Written so that NaN counts as a failure.
        if not leaked <= TOLERANCE[self.precision] / 10:
            return f"tokens attend across examples (logits move by {leaked:.1e} of their spread)"
        if not (moved <= TOLERANCE[self.precision] or _is_noise(packed, alone, padded)):
            return f"positions in a packed row differ (logits move by {moved:.1e} of their spread)"
        return None

    def _drawn(self, lengths: Sequence[int]) -> list[TokenIds]:
        rng = np.random.default_rng(0)
        return [rng.integers(0, self.vocabulary, length).astype(np.int32) for length in lengths]

    @torch.no_grad()
    def _of(self, documents: Sequence[TokenIds], layout: MicroLayout, prompt: int = 0) -> Tensor:
        """Logits at the documents' last own tokens, some of which are labels. Of those after the
        first `prompt` tokens, where documents of a row share these.
        """
        split = TokenizedSplit.from_examples(
            [(ids, np.arange(len(ids)) >= (prompt or len(ids) // 2)) for ids in documents]
        )
        asked = (0, self.device, self.virtual, prompt > 0)
        batch = collate(split, range(len(documents)), layout, *asked)
        width = batch.tokens_BS.shape[1]
        keep_N = [
            span.row * width + place
            for span in batch.spans
            for place in range(
                max(span.start + max(self.virtual, prompt - span.shared), span.stop - READ),
                span.stop,
            )
        ]
        return self.logits(batch, torch.tensor(keep_N, device=self.device))


def _is_noise(packed: Tensor, alone: Tensor, padded: Tensor) -> bool:
    """Whether packing changes logits about as much as padding does."""
    spread = alone.std().item() or 1.0
    moved, noise = (
        (each - alone).square().mean().sqrt().item() / spread for each in (packed, padded)
    )
    return bool(moved <= min(NOISE_RATIO * noise, NOISE_LIMIT))


def _one_document(length: int, vocabulary: int, device: torch.device, virtual: int) -> MicroBatch:
    document = np.random.default_rng(0).integers(0, vocabulary, length).astype(np.int32)
    split = TokenizedSplit.from_examples([(document, np.ones(len(document), bool))])
    return collate(split, [0], ((0,),), 0, device, virtual)


@torch.no_grad()
def returns_its_head(
    by_label: Callable[[MicroBatch, Callable[[Tensor, MicroBatch], Tensor]], Tensor],
    vocabulary: int,
    device: torch.device,
    virtual: int = 0,
) -> bool:
    """Whether a model returns what its head returns, without scaling or capping it."""
    batch = _one_document(LENGTHS[0], vocabulary, device, virtual)
    # Numbers that no cap or scale leaves as they are.
    found = by_label(batch, lambda _, part: 100.0 * part.labels_N.unsqueeze(1) + 1)
    return torch.equal(found.double(), 100.0 * batch.labels_N.unsqueeze(1).double() + 1)


@torch.no_grad()
def same_of_one(
    one: Callable[[MicroBatch], Tensor],
    other: Callable[[MicroBatch], Tensor],
    vocabulary: int,
    precision: Precision,
    device: torch.device,
    virtual: int = 0,
    length: int = LENGTHS[0],
) -> bool:
    """Whether two ways to call a model give the same output for one document of that length."""
    batch = _one_document(length, vocabulary, device, virtual)
    a, b = one(batch), other(batch)
    return bool((a - b).abs().max() <= TOLERANCE[precision] * (b.abs().max() + 1e-6))


def unreached(model: nn.Module, device: torch.device, precision: Precision) -> list[nn.Parameter]:
    """Trained weights on which the output for one token, and a critic's value, do not depend.

    They are read from the graph of a forward pass, without a backward.
    """
    token = torch.zeros((1, 1), dtype=torch.int64, device=device)
    critic = critic_of(model)
    with (
        torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"),
        nullcontext() if critic is None else critic.reading(token.view(-1)),
    ):
        output = model(input_ids=token, use_cache=False)
    waiting, seen, reached = [output.logits.grad_fn], set(), set()
    waiting += [] if critic is None else [critic.values_N.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            reached.add(id(getattr(node, "variable", None)))
            waiting += [before for before, _ in node.next_functions]
    return [p for p in model.parameters() if p.requires_grad and id(p) not in reached]
