"""Plots of a promotion: who won by how much, what it cost in general ability, the alpha curve."""

from __future__ import annotations

from typing import Any

from markupsafe import Markup

from raytune_ft.report.collect import Record
from raytune_ft.report.svg import COLOURS, QUIET, Plot, bounds, shown

WON, TIED = "#059669", "#d97706"
FAMILY = (QUIET, COLOURS[0], "#7c3aed", TIED)
"""By simplicity: the base, one trial, between the two, merges of several."""
FAR = 4.0
"""How many times further than the middle one an interval may reach to be drawn."""
SPAN = 5.0


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
