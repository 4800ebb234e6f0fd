"""What is measured in a promotion: candidates on validation, and the winner on held-out data."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from raytune_ft.config.schema import Config, ModelConfig, ParallelConfig, PromoteConfig
from raytune_ft.data.prepare import PreparedData
from raytune_ft.evaluate.classifier import classification, constant_scores
from raytune_ft.evaluate.evaluate import Job, Measured, is_chat, run_job, split_named
from raytune_ft.model.heads import Head
from raytune_ft.promote.candidates import BASE, BASE_NAME, Entry
from raytune_ft.promote.decide import Contender

CONSTANT = "constant"
"""What classifiers are compared with: always the answer that suits the training set best."""


@dataclass(frozen=True)
class Measurer:
    """One promotion's `base`, data and settings. `retained`, `samples`: see `Job`."""

    base: ModelConfig
    head: Head | None
    config: Config
    settings: PromoteConfig
    data: PreparedData
    retained: Path | None
    samples: int

    @property
    def reference(self) -> str:
        """What a promoted model is compared with: a base whose head says nothing is no model."""
        return BASE_NAME if self.head is None else CONSTANT

    def contenders(self, found: Sequence[Entry], directories: Sequence[Path]) -> list[Contender]:
        """Every candidate on validation, and on the general set; the reference is the first."""
        jobs = [self._job(directory, "validation") for directory in directories]
        measured = measure_all(jobs, self.config.parallel)
        contenders = [
            Contender(entry.name, entry.simplicity, one)
            for entry, one in zip(found, measured, strict=True)
        ]
        if self.head is None:
            return contenders
        constant = self._constant("validation", self.head)
        return [Contender(CONSTANT, BASE, constant, is_model=False), *contenders]

    def held_out(self, split: str, promoted: Path | None) -> tuple[Measured, Measured]:
        """The reference and the promoted model; None: the base was kept, and is both."""
        directories = [Path(self.base.path)] if self.head is None else []
        directories += [] if promoted is None else [promoted]
        jobs = [self._job(directory, split, self.samples) for directory in directories]
        measured = measure_all(jobs, self.config.parallel)
        reference = measured[0] if self.head is None else self._constant(split, self.head)
        return reference, measured[-1]

    def score(self, directory: Path, figure: str) -> float:
        """For merges that look before they add: on validation, and less is better."""
        job = replace(self._job(directory, "validation"), retained=None)
        found = run_job(job).scores[figure]
        return found.value if found.mode == "min" else -found.value

    def _constant(self, split: str, head: Head) -> Measured:
        train = self.data.train
        objective = classification(head, self.config.train.class_weights, train)
        return Measured(constant_scores(train, split_named(self.data, split), objective))

    def _job(self, directory: Path, split: str, samples: int = 0) -> Job:
        base = self.base
        is_base = str(directory) == base.path
        own = base.model_copy(update={"path": str(directory.absolute()), "revision": None})
        return Job(
            base if is_base else own,
            base,
            self.settings,
            self.data.path,
            split,
            self.retained,
            samples,
            is_chat(self.config.data),
            self.head,
            self.config.train.class_weights,
        )


def measure_all(jobs: Sequence[Job], parallel: ParallelConfig) -> list[Measured]:
    """In order; at the same time where this process is part of a Ray cluster."""
    if len(jobs) > 1 and "ray" in sys.modules:  # else nobody has joined a cluster
        from raytune_ft.ray_backend import evaluate as ray_evaluate

        if ray_evaluate.joined():
            return ray_evaluate.measure_all(jobs, parallel)
    return [run_job(job) for job in jobs]


def same_scores(a: Measured, b: Measured) -> bool:
    """Whether every example has the very same loss, as if an adapter had not been applied."""
    one, other = (each.scores["eval_loss"].columns[0] for each in (a, b))
    return bool(np.array_equal(one, other))
