"""What is examined, what a check is, and what becomes of the answers of nodes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Protocol

from raytune_ft.config.schema import Config
from raytune_ft.doctor.findings import ALL, NO_ANSWER, Finding, Row
from raytune_ft.errors import InputError, RaytuneFtError, first_line
from raytune_ft.rundir import run_path

ASK_S = 30.0
IMPORT_S = 240.0
"""For answers that import torch on a cold disk."""
Answers = Mapping[str, Any]


class Site(Protocol):
    """The nodes that are examined, by name; see `NodeProcesses`."""

    nodes: dict[str, Any]
    lost: dict[str, Exception]

    def ask(
        self,
        function: Callable[..., Any],
        arguments: Sequence[Any] | Mapping[str, Sequence[Any]],
        limit_s: float,
    ) -> dict[str, Any]: ...

    def gcs_addresses(self) -> list[str]: ...

    def end(self) -> None: ...


@dataclass
class Subject:
    """What is examined. `undo` removes probe files, also after a check that was given up."""

    site: Site
    config: Config | None = None
    insecure: bool = False
    undo: ExitStack = field(default_factory=ExitStack)

    @property
    def joined(self) -> bool:
        """Whether the nodes are those of a cluster; else there is only this machine."""
        return all(node is not None for node in self.site.nodes.values())

    @property
    def storage(self) -> str:
        """Where a run of the config writes on the nodes; of an object store, its local copy."""
        assert self.config is not None
        return str(run_path(self.config).parent)


Run = Callable[[Subject], Iterable[Row]]
NEEDS = {
    "": "",
    "config": " Only with CONFIG.",
    "nodes": " Only with several nodes.",
    "cluster and config": " Only with CONFIG, on a cluster.",
}
"""What a check is left out without."""


@dataclass(frozen=True)
class Check:
    """
    Attributes:
        looks_at: for the documentation.
        needs: a key of `NEEDS`.
        limit_s: after which the check is given up.
    """

    run: Run
    looks_at: str
    findings: tuple[Finding, ...]
    needs: str = ""
    limit_s: float = 2 * ASK_S


def answered(answers: Answers) -> tuple[dict[str, Any], list[Row]]:
    """The answers without exceptions, and a row for each node without one."""
    good = {node: each for node, each in answers.items() if not isinstance(each, Exception)}
    lost = [NO_ANSWER.on(n, reason=first_line(e)) for n, e in answers.items() if n not in good]
    return good, lost


def judged(answers: Answers, judge: Callable[[dict[str, Any]], Iterable[Row]]) -> list[Row]:
    """What `judge` says of the nodes that answered, and a row for each other one."""
    good, lost = answered(answers)
    return [*(judge(good) if good else ()), *lost]


def without_remedy(error: RaytuneFtError) -> str:
    """What an error says; its remedy is left to the finding."""
    return f"{error.value} {error.rule}" if isinstance(error, InputError) else str(error)


def first_node(subject: Subject) -> str:
    """Its name, for the row of a finding."""
    return next(iter(subject.site.nodes), ALL)


def every_node(subject: Subject) -> str:
    """`ALL`, or the name of the one node."""
    return ALL if len(subject.site.nodes) > 1 else first_node(subject)
