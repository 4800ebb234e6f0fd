"""What one worker computes at a time: its largest micro-batch, and how many make a step."""

from __future__ import annotations

from dataclasses import dataclass

from raytune_ft.config.activations import PrefixMethod, virtual_positions
from raytune_ft.config.schema import Config
from raytune_ft.data.layout import lay_out
from raytune_ft.data.split import TokenizedSplit
from raytune_ft.train.engine import MICRO_TOKENS
from raytune_ft.train.optim import total_examples
from raytune_ft.train.stream import plain_order

LOOKED_AT = 20
"""Steps that are laid out to find the largest micro-batch."""


@dataclass(frozen=True)
class Work:
    """`rows` of `width` tokens with `labels` label tokens are the most of one forward pass;
    `micro_batches` the most passes of a step. `step_tokens` and `step_labels` are of one worker
    and a whole step, in the mean, padding included.
    """

    rows: int
    width: int
    labels: int
    micro_batches: int
    step_tokens: int
    step_labels: int

    @property
    def tokens(self) -> int:
        """Of the largest micro-batch."""
        return self.rows * self.width


def micro_tokens(config: Config, device: str) -> int:
    """The token budget of one forward pass, as the engine chooses it."""
    written = config.train.micro_tokens
    return written if isinstance(written, int) else MICRO_TOKENS[device]


def steps_in_a_pass(config: Config, length: float) -> int:
    """How many steps on examples of this mean length a pass of all workers holds; at least 1."""
    parallel = config.parallel
    device = "cuda" if parallel.resources_per_worker.get("GPU", 0.0) > 0 else "cpu"
    room = micro_tokens(config, device) * parallel.max_workers
    return max(1, int(room // (length * config.train.batch_size)))


def work_of(config: Config, split: TokenizedSplit, workers: int, device: str) -> Work:
    """From the layout of the first steps, as the run would lay them out without a curriculum,
    under which they are not like those to come.
    """
    batch, budget = config.train.batch_size, micro_tokens(config, device)
    virtual = virtual_positions(config.method)
    packing = config.data.packing is not False and not isinstance(config.method, PrefixMethod)
    tokens = labels = rows = width = most = most_labels = passes = 0
    order = plain_order(config, split)
    whole = total_examples(config.train, len(order)) // batch
    steps = min(LOOKED_AT, max(1, whole))
    for step in range(steps):
        indices = order.indices(step * batch, batch)
        lengths = (split.lengths[indices] + virtual).tolist()
        counts = split.label_counts[indices]
        for rank in lay_out(lengths, workers, budget, packing):
            passes = max(passes, len(rank))
            for micro in rank:
                if not micro:
                    continue
                wide = max(sum(lengths[position] for position in row) for row in micro)
                found = sum(int(counts[position]) for row in micro for position in row)
                tokens, labels = tokens + wide * len(micro), labels + found
                most_labels = max(most_labels, found)
                if wide * len(micro) > most:
                    most, rows, width = wide * len(micro), len(micro), wide
    share = steps * workers
    return Work(rows, width, most_labels, passes, round(tokens / share), round(labels / share))


def work_at_most(config: Config, workers: int, device: str) -> Work:
    """Without data: every example as long as it may be, every token with loss."""
    width = config.data.max_length + virtual_positions(config.method)
    examples = -(-config.train.batch_size // workers)
    rows = max(1, min(examples, micro_tokens(config, device) // width))
    passes = -(-examples // rows)
    return Work(rows, width, rows * width, passes, examples * width, examples * width)
