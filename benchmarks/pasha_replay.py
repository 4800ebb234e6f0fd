"""PASHA (arXiv 2207.06940) beside ASHA, replayed over the learning curves of a sweep that was run.

Every trial of the sweep ran to its end (`search.scheduler: null`), so what a rule would have spent,
and which trial it would have found, is known without training. Both rules stop trials for good, as
`search.scheduler` does. PASHA's rungs end at the second one and grow while the two top rungs rank
their trials differently; its winner is then trained on to the end, which is counted.

    python benchmarks/pasha_replay.py runs/curves
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
from collections.abc import Callable
from pathlib import Path

import numpy as np

from raytune_ft.config.search import AshaConfig
from raytune_ft.ray_backend.schedulers import scheduler_for

Curve = list[tuple[int, float]]
WORKERS = 4
ORDERS = 200


class PashaRule:
    """Ray's ASHA, over rungs that appear when they are needed. Losses: lower is better."""

    def __init__(self, grace: int, factor: int, budget: int, epsilon: float) -> None:
        self._factor, self._epsilon = factor, epsilon
        self._rungs = [grace]
        while self._rungs[-1] * factor < budget:
            self._rungs.append(self._rungs[-1] * factor)
        self._top = min(1, len(self._rungs) - 1)
        self._seen: list[dict[str, float]] = [{} for _ in self._rungs]

    def goes_on(self, trial: str, examples: int, loss: float) -> bool:
        """Whether a trial goes on after this evaluation."""
        for number, rung in enumerate(self._rungs[: self._top + 1]):
            seen = self._seen[number]
            if examples < rung or trial in seen:
                continue
            cut = np.percentile(list(seen.values()), 100 / self._factor) if seen else loss
            seen[trial] = loss
            if loss > cut:
                return False
        if examples < self._rungs[self._top]:
            return True
        if self._top + 1 < len(self._rungs) and not self._is_stable():
            self._top += 1
            return True
        return False

    def _is_stable(self) -> bool:
        below, top = self._seen[self._top - 1], self._seen[self._top]
        names = sorted(top, key=top.__getitem__)
        return all(
            below[better] <= below[worse] + self._epsilon
            for index, better in enumerate(names)
            for worse in names[index + 1 :]
        )


def replay(
    curves: dict[str, Curve], goes_on: Callable[[str, int, float], bool]
) -> tuple[int, str, dict[str, int]]:
    """Examples spent, the trial with the lowest loss seen, and how far each trial came.

    Trials begin in the order of `curves`, `WORKERS` at a time, and report in turns.
    """
    waiting = list(curves)
    running: list[str] = []
    came: dict[str, int] = {}
    lowest: dict[str, float] = {}
    at: dict[str, int] = {}
    while waiting or running:
        while waiting and len(running) < WORKERS:
            running.append(waiting.pop(0))
        for trial in list(running):
            step = at.get(trial, 0)
            examples, loss = curves[trial][step]
            at[trial], came[trial] = step + 1, examples
            lowest[trial] = min(loss, lowest.get(trial, loss))
            if step + 1 == len(curves[trial]) or not goes_on(trial, examples, loss):
                running.remove(trial)
    return sum(came.values()), min(lowest, key=lowest.__getitem__), came


def asha(grace: int, factor: int, budget: int) -> Callable[[str, int, float], bool]:
    """The rule of `search.scheduler: asha`, by its own code."""
    config = AshaConfig(grace_examples=grace, reduction_factor=factor)
    rule = scheduler_for(config, budget, "loss", "min")
    trials: dict[str, object] = {}

    def goes_on(trial: str, examples: int, loss: float) -> bool:
        if trial not in trials:
            trials[trial] = _Trial(trial, budget)
            rule.on_trial_add(None, trials[trial])
        report = {"examples": examples, "loss": loss}
        return rule.on_trial_result(None, trials[trial], report) == "CONTINUE"

    return goes_on


class _Trial:
    def __init__(self, name: str, budget: int) -> None:
        self.trial_id, self.config = name, {"trial": name, "budget": budget}


def read_curves(sweep: Path) -> dict[str, Curve]:
    """By trial, the examples and the loss of every evaluation after the base."""
    curves = {}
    for folder in sorted((sweep / "trials").iterdir()):
        lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        curves[folder.name] = [
            (line["examples"], line["eval_loss"])
            for line in lines
            if "eval_loss" in line and line["examples"] > 0
        ]
    return curves


def main() -> None:
    """Prints a row for each rule: means over orders in which the trials might have been drawn."""
    parser = argparse.ArgumentParser()
    parser.add_argument("sweep", type=Path)
    parser.add_argument("--grace", type=int, default=138)
    arguments = parser.parse_args()
    curves = read_curves(arguments.sweep)
    budget = max(curve[-1][0] for curve in curves.values())
    finals = {trial: min(loss for _, loss in curve) for trial, curve in curves.items()}
    whole = budget * len(curves)
    print(f"{len(curves)} curves of {budget} examples; best of all {min(finals.values()):.4f}")
    print("| rule | factor | share of the examples | best loss | regret, worst order |")
    print("|---|---|---|---|---|")
    for factor in (2, 3, 4):
        for name in ("asha", "pasha", "pasha, epsilon 0.02"):
            spent, found = [], []
            for seed in range(ORDERS):
                names = list(curves)
                random.Random(seed).shuffle(names)
                epsilon = 0.02 if "epsilon" in name else 0.0
                goes_on = (
                    asha(arguments.grace, factor, budget)
                    if name == "asha"
                    else PashaRule(arguments.grace, factor, budget, epsilon).goes_on
                )
                examples, best, came = replay({n: curves[n] for n in names}, goes_on)
                spent.append((examples + budget - came[best]) / whole)
                found.append(finals[best])
            regret = max(found) - min(finals.values())
            print(
                f"| {name} | {factor} | {statistics.mean(spent):.1%} "
                f"| {statistics.mean(found):.4f} | {regret:.4f} |"
            )


if __name__ == "__main__":
    main()
