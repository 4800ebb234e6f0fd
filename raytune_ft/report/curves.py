"""Plots of training: learning curves, rungs, time."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from raytune_ft.config.search import AshaConfig, HyperbandConfig
from raytune_ft.report.collect import Facts, Record, Trial
from raytune_ft.report.svg import COLOURS, QUIET, Plot, bounds, legend, shown

STATUS = {
    "completed": "#059669",
    "early_stopped": "#0891b2",
    "pruned": "#94a3b8",
    "failed": "#dc2626",
    "interrupted": "#d97706",
}
SPAN = 5.0
"""Values whose largest is so many times the smallest are shown on a logarithmic axis."""
MAX_POINTS = 400


def learning_curves(facts: Facts) -> Markup:
    """The evaluations of every trial over examples; the best one stands out."""
    metric = facts.metric
    lines = {trial.id: _points(trial, metric) for trial in facts.trials}
    lines = {name: points for name, points in lines.items() if points}
    if not lines:
        return Markup("")
    steps = [] if facts.is_sweep else _thinned(facts.trials[0].steps)
    values = [y for points in lines.values() for _, y in points]
    values += [step["loss"] for step in steps if step.get("loss") is not None]
    longest = max(x for points in lines.values() for x, _ in points)
    log = min(values) > 0 and max(values) > SPAN * min(values)
    plot = Plot((0, longest), bounds(values, log), "examples", metric, log_y=log)
    plot.line(
        ((step["examples"], step["loss"]) for step in steps if step.get("loss") is not None),
        "#cbd5e1",
        "training loss",
        1.0,
    )
    for trial in sorted(facts.trials, key=lambda one: one.id == facts.best):
        points = lines.get(trial.id)
        if not points:
            continue
        is_best = trial.id == facts.best
        colour = COLOURS[0] if is_best else STATUS.get(trial.status, QUIET)
        title = f"{trial.id} ({trial.status}) {_params(trial)}"
        plot.line(points, colour, title, 3 if is_best else 1.2)
        for x, y in points:
            plot.point(x, y, colour, f"{title}: {shown(y)} after {x:,.0f}", 4 if is_best else 2.5)
    keys = [("training loss", "#cbd5e1")] if steps else []
    seen = {trial.status for trial in facts.trials if trial.id != facts.best}
    keys += [(name.replace("_", " "), colour) for name, colour in STATUS.items() if name in seen]
    best = [(f"{facts.best}, the best" if facts.is_sweep else "evaluation", COLOURS[0])]
    return plot.render() + legend([*(best if facts.best else []), *keys])


def source_curves(facts: Facts) -> Markup:
    """The loss on each source over examples, of the best trial."""
    trial = next((one for one in facts.trials if one.id == facts.best), None)
    lines: dict[str, list[tuple[float, float]]] = {}
    for each in trial.evaluations if trial else ():
        for name, value in (each.get("eval_loss_by_source") or {}).items():
            if value is not None:
                lines.setdefault(name, []).append((each["examples"], value))
    if not lines:
        return Markup("")
    values = [y for points in lines.values() for _, y in points]
    longest = max(x for points in lines.values() for x, _ in points)
    log = min(values) > 0 and max(values) > SPAN * min(values)
    plot = Plot((0, longest), bounds(values, log), "examples", "eval_loss", log_y=log)
    keys = []
    for number, (name, points) in enumerate(lines.items()):
        colour = COLOURS[number % len(COLOURS)]
        plot.line(points, colour, name, 2)
        for x, y in points:
            plot.point(x, y, colour, f"{name}: {shown(y)} after {x:,.0f}", 3)
        keys.append((name, colour))
    return plot.render() + legend(keys)


def rungs(facts: Facts) -> Markup:
    """Who was stopped at which rung: every trial's value there, a ring where it went no further."""
    search = facts.config.search
    scheduler = search.scheduler if search else None
    if not isinstance(scheduler, AshaConfig | HyperbandConfig) or not facts.is_sweep:
        return Markup("")
    longest = max((trial.examples for trial in facts.trials), default=0)
    levels = []
    level = scheduler.grace_examples
    while level < longest:
        levels.append(level)
        level *= scheduler.reduction_factor
    at = {level: _reached(facts, level) for level in levels}
    values = [value for found in at.values() for _, value, _ in found]
    if not values:
        return Markup("")
    log = min(values) > 0 and max(values) > SPAN * min(values)
    wide = (levels[0] / 1.4, levels[-1] * 1.9)
    plot = Plot(
        wide, bounds(values, log, 0.15), "examples at the rung", facts.metric, log_x=True, log_y=log
    )
    for level, found in at.items():
        on = sum(goes_on for _, _, goes_on in found)
        plot.vertical(level, f"{on} of {len(found)} went on")
        for trial, value, goes_on in sorted(found, key=lambda one: one[0].id == facts.best):
            colour = COLOURS[0] if trial.id == facts.best else STATUS.get(trial.status, QUIET)
            title = f"{trial.id} ({trial.status}): {shown(value)} at {level:,}. {_params(trial)}"
            plot.point(level, value, colour, title, 5, hollow=not goes_on)
    return plot.render()


def times(facts: Facts) -> Markup:
    """Seconds of every trial, in the colour of how it ended."""
    trials = [trial for trial in facts.trials if trial.wall_s > 0]
    if len(trials) < 2:
        return Markup("")
    height = 70 + 20 * len(trials)
    plot = Plot(
        (0, max(trial.wall_s for trial in trials) * 1.1),
        (len(trials) - 0.3, -0.7),
        "seconds",
        "",
        height=height,
        left=110,
        y_names=[trial.id for trial in trials],
    )
    for i, trial in enumerate(trials):
        title = f"{trial.id} ({trial.status}): {trial.wall_s:.1f} s, {trial.examples:,} examples"
        plot.bar(trial.wall_s, i, STATUS.get(trial.status, QUIET), title, 12)
    seen = {trial.status for trial in trials}
    return plot.render() + legend(
        [(name.replace("_", " "), colour) for name, colour in STATUS.items() if name in seen]
    )


def _points(trial: Trial, metric: str) -> list[tuple[float, float]]:
    return [
        (each["examples"], each[metric])
        for each in trial.evaluations
        if each.get(metric) is not None
    ]


def _reached(facts: Facts, level: int) -> list[tuple[Trial, float, bool]]:
    """Trials that came to a rung, their value there, and whether they went on."""
    found = []
    for trial in facts.trials:
        points = [(x, y) for x, y in _points(trial, facts.metric) if x >= level]
        if points:
            x, value = points[0]
            found.append((trial, value, trial.examples > x or trial.status == "completed"))
    return found


def _thinned(steps: Sequence[Record]) -> list[Record]:
    every = max(1, len(steps) // MAX_POINTS)
    return list(steps[::every])


def _params(trial: Trial) -> str:
    return " ".join(
        f"{name.rpartition('.')[2]}={shown(value) if isinstance(value, float) else value}"
        for name, value in trial.params.items()
    )
