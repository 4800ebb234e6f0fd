"""Plots of training: learning curves, rungs, time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from raytune_ft.config.search import SCHEDULERS
from raytune_ft.report.collect import Facts, Record, Trial
from raytune_ft.report.svg import COLOURS, QUIET, Plot, bounds, legend, shown

WON, TIED = "#059669", "#d97706"
FAMILY = (QUIET, COLOURS[0], "#7c3aed", TIED)
"""By simplicity: the base, one trial, between the two, merges of several."""
FAR = 4.0
"""How many times further than the middle one an interval may reach to be drawn."""


def forest(promoted: Record) -> Markup:
    """Every candidate's difference to the best one on validation, with its interval."""
    rows = promoted["candidates"]
    if len(rows) < 2:
        return Markup("")
    low, high = bounds(_near(rows), margin=0.12)
    span = (low, high + 0.35 * (high - low))  # room for the labels
    plot = Plot(
        span,
        (len(rows) - 0.3, -0.7),
        f"{promoted['metric']} minus that of the best candidate, {_percent(promoted)} interval",
        "",
        height=70 + 34 * len(rows),
        left=150,
        y_names=[row["name"] for row in rows],
    )
    plot.vertical(0.0)
    for i, row in enumerate(rows):
        value = row["figures"][promoted["metric"]]
        is_winner = row["name"] == promoted["winner"]
        title = f"{row['name']}: {promoted['metric']} {shown(value)}"
        if row["difference"] is None:  # the best one
            plot.point(0.0, i, WON if is_winner else TIED, title, 7)
            plot.label(0.0, i, _mark(shown(value), is_winner))
            continue
        if row["interval"] is None:  # too few examples
            plot.label(0.0, i, _mark(f"{shown(value)}, too few examples", is_winner))
            continue
        low, high = row["interval"]
        colour = WON if is_winner else TIED if low <= 0 <= high else QUIET
        if low > span[1] or high < span[0]:
            plot.label(span[1] if low > 0 else span[0], i, f"{shown(value)}, far off")
            continue
        plot.interval(low, high, i, colour, f"{title}; {shown(low)} to {shown(high)}")
        plot.point(row["difference"], i, colour, title, 5)
        plot.label(max(high, row["difference"]), i, _mark(shown(value), is_winner))
    return plot.render()


def _near(rows: list[dict[str, Any]]) -> list[float]:
    """Ends of the intervals that are shown: those far off would press all others into one point."""
    ends = sorted(([*row["interval"]] for row in rows if row["interval"]), key=_reach)
    usual = _reach(ends[len(ends) // 2]) if ends else 0.0
    return [0.0, *(end for pair in ends if _reach(pair) <= FAR * usual for end in pair)]


def _reach(interval: list[float]) -> float:
    return max(map(abs, interval))


def gain_and_retention(promoted: Record) -> Markup:
    """The deciding figure against the divergence from the base, for every candidate."""
    metric = promoted["metric"]
    rows = [row for row in promoted["candidates"] if "retention_kl" in row["figures"]]
    if len(rows) < 2:
        return Markup("")
    xs = [row["figures"]["retention_kl"] for row in rows]
    ys = [row["figures"][metric] for row in rows]
    plot = Plot(
        bounds([0.0, *xs], margin=0.1),
        bounds(ys, _wide(ys), 0.12),
        "KL from the base on the general set (nats a token): further right, more forgotten",
        f"{metric} (validation)",
        log_y=_wide(ys),
    )
    points = [
        (row["name"] == promoted["winner"], row, x, y)
        for row, x, y in zip(rows, xs, ys, strict=True)
    ]
    for is_winner, row, x, y in sorted(points, key=lambda one: one[0]):
        title = f"{row['name']}: {metric} {shown(y)}, KL {shown(x)}"
        colour = WON if is_winner else FAMILY[min(row["simplicity"], len(FAMILY) - 1)]
        plot.point(x, y, colour, title, 6)
    for is_winner, row, x, y in sorted(points, key=lambda one: not one[0]):
        plot.label(x, y, _mark(row["name"], is_winner))
    return plot.render()


def alpha_curve(promoted: Record) -> Markup:
    """WiSE-FT: the deciding figure, and what was retained, between the base and the fine-tuned."""
    points = _alphas(promoted)
    if len(points) < 3:
        return Markup("")
    metric = promoted["metric"]
    ys = [row["figures"][metric] for _, row in points]
    plot = Plot(
        (-0.03, 1.06),
        bounds(ys, _wide(ys), 0.12),
        "alpha: 0 is the base, 1 the fine-tuned model",
        f"{metric} (validation)",
        log_y=_wide(ys),
    )
    plot.line([(a, row["figures"][metric]) for a, row in points], COLOURS[0], metric, 2)
    for alpha, row in points:
        is_winner = row["name"] == promoted["winner"]
        value = row["figures"][metric]
        kl = row["figures"].get("retention_kl")
        title = f"{row['name']}: {metric} {shown(value)}"
        title += f", KL from the base {shown(kl)}" if kl is not None else ""
        plot.point(alpha, value, WON if is_winner else COLOURS[0], title, 7 if is_winner else 4)
        if is_winner:
            plot.label(alpha, value * (1.25 if _wide(ys) else 1.0), "promoted")
    return plot.render()


def _alphas(promoted: Record) -> list[tuple[float, dict[str, Any]]]:
    """The interpolations, with the base at 0 and the single trial that they begin at 1."""
    rows = promoted["candidates"]
    between = [(float(row["settings"]["alpha"]), row) for row in rows if "alpha" in row["settings"]]
    if not between:
        return []
    ends = [(float(row["simplicity"]), row) for row in rows if row["simplicity"] in (0, 1)]
    known = {alpha for alpha, _ in between}
    points = [*between, *(end for end in ends if end[0] not in known)]
    return sorted(points, key=lambda point: point[0])


def _wide(values: list[float]) -> bool:
    """Whether a logarithmic axis shows them better."""
    return min(values) > 0 and max(values) > SPAN * min(values)


def _mark(text: str, is_winner: bool) -> str:
    return f"{text} ✓ promoted" if is_winner else text


def _percent(promoted: Record) -> str:
    return f"{promoted.get('confidence', 0.95):.0%}"


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
    if scheduler is None or not facts.is_sweep:
        return Markup("")
    longest = max((trial.examples for trial in facts.trials), default=0)
    levels = SCHEDULERS[scheduler.name].rungs(scheduler, longest)
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
