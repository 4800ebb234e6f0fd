"""What the steps of a run are trained on, and how it is measured."""

from __future__ import annotations

import time
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from torch import Tensor

from raytune_ft.data.arrays import Indices
from raytune_ft.data.batch import MicroBatch
from raytune_ft.data.prepared import PreparedData
from raytune_ft.data.split import TokenizedSplit
from raytune_ft.train.evaluation import Scores, evaluate
from raytune_ft.train.model_runner import ModelRunner
from raytune_ft.train.speaker import Answered, Turn
from raytune_ft.train.watchdog import Beat


@dataclass(frozen=True)
class Work:
    """One step.

    Attributes:
        examples: of the stream, which the budget counts.
        split: what is trained on.
        indices: the examples of `split` in this step, on all ranks.
        batches: this rank's part of them, in host memory.
        began: when the work on the step began, by `time.perf_counter`.
        figures: what is known of them before the step.
    """

    examples: Indices
    split: TokenizedSplit
    indices: Indices
    batches: Sequence[MicroBatch]
    began: float
    figures: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, split: TokenizedSplit, indices: Indices, batches: Sequence[MicroBatch]) -> Work:
        """A step on given examples that begins now."""
        return cls(indices, split, indices, batches, time.perf_counter())


class Stream(Protocol):
    """The examples that are still to be trained on, as `train.run_state.RunState` has them."""

    @property
    def remaining(self) -> range:
        """The numbers of the steps."""

    def place(self, step: int) -> tuple[int, int]:
        """Where in the stream the examples of a step begin, and how many they are."""

    def examples(self, start: int, count: int) -> Indices:
        """Examples of the training split, by their places in the stream."""


class Material(Protocol):
    """Gives each step what it is trained on."""

    def steps(self, stream: Stream) -> Generator[Work]:
        """The work of each step that remains."""

    def turn(self, stream: Stream, step: int) -> Turn | None:
        """What the model is asked before this step; None: nothing."""

    def hear(self, stream: Stream, step: int, turn: Turn, answered: Answered) -> None:
        """Take the answers to the turn of this step. Raises RunFailed where nothing can be learnt
        from them.
        """

    def work(self, stream: Stream, step: int) -> Work:
        """A step without its micro-batches, once the answers that it needs are there."""

    def evaluate(self, beat: Beat) -> Scores:
        """The model as it is now, on the validation split."""

    def evaluation(self) -> Turn | None:
        """What the model is asked in an evaluation; None: nothing. Raises RunFailed where the
        answers could not be scored.
        """

    def scores(self, measured: Scores | None, answered: Answered | None) -> Scores:
        """Those of an evaluation, from what was `measured` on the data, where the objective does
        that, and what was answered to its turn. Raises RunFailed where a reward scored nothing.
        """

    def state(self, step: int) -> Mapping[str, Tensor]:
        """What a checkpoint of this step must keep beside weights and moments, on rank 0."""

    def restore(self, checkpoint: Path, step: int) -> None:
        """Go on from a checkpoint of `step`. Raises CheckpointError where it lacks something."""


class Given(Material):
    """The splits of the data, as they are."""

    def __init__(self, runner: ModelRunner, data: PreparedData) -> None:
        self._runner, self._data = runner, data

    def steps(self, stream: Stream) -> Generator[Work]:
        """Micro-batches are made while the step before is computed."""
        train = self._data.train
        upcoming = (stream.examples(*stream.place(step)) for step in stream.remaining)
        steps = self._runner.steps(train, upcoming)
        began = time.perf_counter()
        for indices, batches in steps:
            yield Work(indices, train, indices, batches, began)
            began = time.perf_counter()

    def turn(self, stream: Stream, step: int) -> Turn | None:
        return None

    def hear(self, stream: Stream, step: int, turn: Turn, answered: Answered) -> None: ...

    def work(self, stream: Stream, step: int) -> Work:
        return Work.of(self._data.train, stream.examples(*stream.place(step)), ())

    def evaluate(self, beat: Beat) -> Scores:
        return evaluate(self._runner, self._data.validation, beat)

    def evaluation(self) -> Turn | None:
        return None

    def scores(self, measured: Scores | None, answered: Answered | None) -> Scores:
        assert measured is not None
        return measured

    def state(self, step: int) -> Mapping[str, Tensor]:
        return {}

    def restore(self, checkpoint: Path, step: int) -> None: ...
