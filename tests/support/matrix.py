"""Cases of strategy x activations x method x family, run many to a group of processes."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.distributed import run_distributed, run_in_new_processes
from tests.support.models import save_tiny, true_float64
from tests.support.runs import largest_difference, make_config, run, write_rows

BOUNDS = {"float64": 1e-9, "float32": 1e-5}  # of losses, evaluations and weights
STEPS = {"float64": 12, "float32": 40, "bfloat16": 12}
STRATEGIES: dict[str, tuple[str, int, dict[str, Any]]] = {
    "single": ("single", 1, {}),
    "ddp 2": ("ddp", 2, {}),
    "fsdp 2": ("fsdp", 2, {}),
    "fsdp 3": ("fsdp", 3, {}),
    **{f"zero-{n} 2": ("deepspeed", 2, {"parallel.zero_stage": n}) for n in (1, 2, 3)},
}


@dataclass(frozen=True)
class Case:
    """One run of a tiny model, to be compared with the same in one process, row by row."""

    strategy: str
    activations: str
    method: str
    family: str
    precision: str

    @property
    def name(self) -> str:
        """Its folder."""
        return "-".join(vars(self).values()).replace(" ", "")


class Workshop:
    """Models, rows and references in a folder, each made when it is first asked for."""

    def __init__(self, root: Path, float32_steps: int = STEPS["float32"]) -> None:
        self.root = root
        self._steps = STEPS | {"float32": float32_steps}

    def reference(self, case: Case) -> Path:
        """One example after another in one process: no packing, no padding, one row at a time."""
        directory = self.root / f"reference-{case.method}-{case.family}-{case.precision}"
        if not (directory / "result.json").is_file():
            layout = {"data.packing": False, "train.micro_tokens": 1}
            self.train(case, directory, "single", layout)
        return directory

    def model(self, family: str) -> Path:
        """A tiny model of a family."""
        directory = self.root / family
        return directory if directory.is_dir() else save_tiny(family, directory)

    def prepare(self, cases: Iterable[Case]) -> None:
        """What processes must not make at the same time."""
        if not (self.root / "rows.jsonl").is_file():
            write_rows(self.root / "rows.jsonl", 60)
        for case in cases:
            self.model(case.family)

    def train(self, case: Case, directory: Path, strategy: str, layout: dict[str, Any]) -> None:
        """On every rank.

        Adam's epsilon is above rounding: a bias of attention's keys has no gradient, which is
        rounding alone in float32, and would be scaled up to a full step. With 1e-6 seed 0 has such
        a weight too: one of 512 in a LoRA's A moves by 1.6e-5 where all others agree to 1e-6; and
        so has seed 1 on some processors.
        """
        changes = {
            "method": {"name": case.method},
            "train.precision": case.precision,
            "train.adam_epsilon": 1e-5,
            "seed": 1,
            "train.max_examples": 7 * self._steps[case.precision] - 3,
            "train.eval_every_examples": 140,
            "checkpoint.every_examples": 1000,
        }
        config = make_config(self.model(case.family), self.root / "rows.jsonl", changes | layout)
        with true_float64() if case.precision == "float64" else nullcontext():
            result = run(config, directory, strategy)
        assert result.status == "completed", result.error

    def measure(self, case: Case) -> float:
        """The largest difference from the reference in losses, evaluations and weights."""
        return max(largest_difference(self.root / case.name, self.reference(case)))


def run_case(workshop: Workshop, case: Case) -> None:
    """Train it where it belongs; on every rank."""
    strategy, _, changes = STRATEGIES[case.strategy]
    layout = {
        "data.packing": "auto",
        "train.micro_tokens": 96,
        "parallel.activation_checkpointing": case.activations,
        **changes,
    }
    workshop.train(case, workshop.root / case.name, strategy, layout)


def _run_cases(workshop: Workshop, cases: Sequence[Case]) -> None:
    for case in cases:
        run_case(workshop, case)


def run_group(workshop: Workshop, cases: Sequence[Case]) -> dict[Case, float | str]:
    """Cases of one strategy, in one group of processes while none fails.

    The largest difference of each, or what it failed with; the others go on in a new group.
    """
    found: dict[Case, float | str] = {}
    waiting = list(cases)
    workshop.prepare(waiting)
    while waiting:
        failure = None
        try:
            if (world_size := STRATEGIES[waiting[0].strategy][1]) == 1:
                _run_cases(workshop, waiting)
            else:
                zero = waiting[0].strategy.startswith("zero")
                run_cases = run_in_new_processes if zero else run_distributed
                run_cases(_run_cases, world_size, workshop, waiting)
        except RuntimeError as error:
            failure = str(error).strip().splitlines()[-1]
        while waiting and _completed(workshop.root / waiting[0].name):
            found[waiting[0]] = workshop.measure(waiting[0])
            waiting.pop(0)
        if failure is not None:
            assert waiting, failure
            found[waiting.pop(0)] = failure
    return found


def _completed(run_dir: Path) -> bool:
    path = run_dir / "result.json"
    return path.is_file() and json.loads(path.read_text())["status"] == "completed"


def passed(case: Case, outcome: float | str) -> bool:
    """Is it within the bound of its precision?"""
    return isinstance(outcome, float) and outcome < BOUNDS[case.precision]


def as_table(outcomes: dict[Case, float | str]) -> str:
    """Markdown: a line for each strategy and method, a column for each family."""
    families = list(dict.fromkeys(case.family for case in outcomes))
    lines: dict[tuple[str, str, str], dict[str, list[str]]] = {}
    reasons: dict[str, int] = {}
    for case, outcome in outcomes.items():
        if isinstance(outcome, float):
            cell = f"{outcome:.0e}" + ("" if passed(case, outcome) else " FAIL")
        else:
            cell = f"[{reasons.setdefault(outcome, len(reasons) + 1)}]"
        line = lines.setdefault((case.strategy, case.activations, case.method), {})
        line.setdefault(case.family, []).append(cell)
    table = [f"| strategy | activations | method | {' | '.join(families)} |"]
    table.append("|---" * (3 + len(families)) + "|")
    for key, line in lines.items():
        cells = [" / ".join(line.get(family, ["-"])) for family in families]
        table.append(f"| {' | '.join([*key, *cells])} |")
    table += [f"[{number}] {reason}" for reason, number in reasons.items()]
    return "\n".join(table) + "\n"
