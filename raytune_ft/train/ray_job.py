"""What whoever started a run hears of it, wherever it trains. Importing this loads no ray.train."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from raytune_ft.errors import RaytuneFtError
from raytune_ft.records import EvalMetrics


@dataclass(frozen=True)
class Report:
    """An evaluation; its checkpoint, if it earned one, is on disk."""

    metrics: EvalMetrics
    checkpoint: str | None

    @classmethod
    def of(cls, values: dict[str, Any]) -> Report:
        """From the plain values of a message."""
        numbers: dict[str, Any] = {name: values.get(name) for name in EvalMetrics.__annotations__}
        return cls(EvalMetrics(**numbers), values["checkpoint"])


@dataclass(frozen=True)
class Note:
    """Something for people to read."""

    text: str


@dataclass(frozen=True)
class Ended:
    """The run is over and nothing of it is left on the cluster."""

    error: RaytuneFtError | None


class StopRequested(Exception):
    """Everybody was told to stop."""


class Job(Protocol):
    """A run that trains somewhere else, from `start` to `stop`."""

    def start(self) -> None:
        """Wait for a free place, then begin.

        Raises:
            StopRequested: before there was one.
        """

    def next(self, timeout_s: float = 1.0) -> Report | Note | Ended | None:
        """The next thing that happened, in order; None when nothing did for `timeout_s`.

        Raises:
            StopRequested: nothing more will be listened to; call `stop`.
        """

    def wind_down(self, grace_s: float) -> None:
        """Ask the run to save and to leave, and wait for that, but no longer than `grace_s`."""

    def stop(self) -> None:
        """End it wherever it is; returns when its place is free."""
