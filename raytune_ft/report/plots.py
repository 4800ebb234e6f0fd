"""The plots of `report.html`, as plotly figures: training, promotion, and Optuna's own of a search.

Each function returns None where there is nothing to plot.
"""

from __future__ import annotations

import html
import json
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import plotly.graph_objects as go

from raytune_ft.config.objectives import REWARD
from raytune_ft.config.search import SCHEDULERS
from raytune_ft.format import number, params_text, seconds
from raytune_ft.report.collect import Facts, Record, Trial

COLOURS = (
    *("#2563eb", "#d97706", "#059669", "#dc2626"),
    *("#7c3aed", "#0891b2", "#be185d", "#65a30d"),
)
BEST, QUIET, LOSS = COLOURS[0], "#94a3b8", "#cbd5e1"
WON, TIED = "#059669", "#d97706"
FAMILY = (QUIET, COLOURS[0], "#7c3aed", TIED)
"""By simplicity: the base, one trial, interpolations, merges of several."""
STATUS = {
    "completed": "#059669",
    "early_stopped": "#0891b2",
    "pruned": "#94a3b8",
    "failed": "#dc2626",
    "interrupted": "#d97706",
}
FAR = 4.0
"""An interval that reaches this many times further than the median one is not drawn."""
SPAN = 5.0
"""The axis is logarithmic where the largest value is more than this many times the smallest."""
MAX_POINTS = 400
MAX_NAME = 22
FEWEST = 4
"""Completed trials that importances of parameters need."""


@dataclass(frozen=True)
class Plot:
    """A plot of the page.

    Attributes:
        about: a sentence above it.
        label: what a screen reader says in its place.
        figure: plotly's JSON.
    """

    title: str
    about: str
    label: str
    figure: str


def plots(facts: Facts) -> list[Plot]:
    """Those of training and promotion that have something to show, in the order of the page."""
    found = [learning_curves(facts), source_curves(facts), *said_curves(facts)]
    found.append(lengths(facts))
    if facts.promoted is not None:
        found += [
            candidates(facts.promoted),
            gain_and_retention(facts.promoted),
            alpha_curve(facts.promoted),
        ]
    found += [rungs(facts), times(facts)]
    return [plot for plot in found if plot is not None]


def learning_curves(facts: Facts) -> Plot | None:
    """The evaluations of every trial over examples, and the training loss of a single run."""
    metric = facts.metric
    points = {trial.id: _points(trial, metric) for trial in facts.trials}
    if not any(points.values()):
        return None
    steps = [] if facts.is_sweep else _thinned(facts.trials[0].steps)
    losses = [(step["examples"], step["loss"]) for step in steps if step.get("loss") is not None]
    traces = [_line(losses, LOSS, "training loss", "training loss", markers=0)] if losses else []
    seen = set[str]()
    for trial in sorted(facts.trials, key=lambda one: one.id == facts.best):
        if not points[trial.id]:
            continue
        hover = f"{trial.id} ({trial.status}) {_short(trial)}"
        if trial.id == facts.best:
            name = f"{trial.id}, the best" if facts.is_sweep else "evaluation"
            traces.append(_line(points[trial.id], BEST, name, hover, width=3, markers=8))
            continue
        colour = STATUS.get(trial.status, QUIET)
        traces.append(_line(points[trial.id], colour, trial.status.replace("_", " "), hover))
        traces[-1].showlegend = trial.status not in seen
        seen.add(trial.status)
    values = [y for line in points.values() for _, y in line] + [y for _, y in losses]
    title = "Learning curves" if facts.is_sweep else "Learning curve"
    about = f"{metric} on the validation set."
    return _plot(title, about, traces, "examples", metric, log_y=_wide(values))


def source_curves(facts: Facts) -> Plot | None:
    """The best trial's loss on each source of the validation set, over examples."""
    trial = facts.best_trial
    lines: dict[str, list[tuple[float, float]]] = {}
    for each in trial.evaluations if trial else ():
        for name, value in (each.get("eval_loss_by_source") or {}).items():
            if value is not None:
                lines.setdefault(name, []).append((each["examples"], value))
    if not lines:
        return None
    traces = [
        _line(points, COLOURS[i % len(COLOURS)], name, name, width=2, markers=6)
        for i, (name, points) in enumerate(lines.items())
    ]
    about = "Loss on the validation examples of each source"
    about += f", {facts.best}." if facts.is_sweep else "."
    values = [y for points in lines.values() for _, y in points]
    return _plot("Sources", about, traces, "examples", "eval_loss", log_y=_wide(values))


SAID = {
    "eval_kl": ("Divergence", "KL from the model before training, of a completion, in nats"),
    "eval_completion_tokens": ("Length", "Tokens of a completion"),
    "eval_truncated": ("Cut completions", "Share of completions that were cut at the limit"),
}


def said_curves(facts: Facts) -> list[Plot | None]:
    """What the best trial's model says to the validation prompts, over examples: its rewards, and
    each figure of `SAID`.
    """
    trial = facts.best_trial
    lines: dict[str, list[tuple[float, float]]] = {}
    for each in trial.evaluations if trial else ():
        for name, value in each.items():
            scored = name == REWARD.name or name.startswith(f"{REWARD.name}:")
            if (scored or name in SAID) and value is not None:
                lines.setdefault(name, []).append((each["examples"], value))
    whose = f", {facts.best}." if facts.is_sweep else "."
    rewards = [name for name in lines if name not in SAID]
    traces = [
        _line(lines[name], COLOURS[i % len(COLOURS)], name, name, width=2, markers=6)
        for i, name in enumerate(rewards)
    ]
    about = f"Mean rewards of what the model says to the validation prompts{whose}"
    found: list[Plot | None] = []
    if traces:
        found.append(_plot("Rewards", about, traces, "examples", "reward", log_y=False))
    for name, (title, words) in SAID.items():
        if name in lines:
            trace = _line(lines[name], BEST, name, name, width=2, markers=6)
            found.append(_plot(title, f"{words}{whose}", [trace], "examples", name, log_y=False))
    return found


def candidates(promoted: Record) -> Plot | None:
    """Each candidate's difference to the best one on validation, with its interval."""
    rows, metric = promoted["candidates"], promoted["metric"]
    if len(rows) < 2:
        return None
    ends = _ends_to_show(rows)
    margin = 0.12 * (max(ends) - min(ends)) or 1.0
    low_end, high_end = min(ends) - margin, max(ends) + 5 * margin  # room for the labels
    traces = []
    for i, row in enumerate(rows):
        is_winner = row["name"] == promoted["winner"]
        value = number(row["figures"][metric])
        hover = f"{row['name']}: {metric} {value}"
        low, high = row["interval"] or (0.0, 0.0)
        colour = WON if is_winner else TIED if low <= 0 <= high else QUIET
        # The best candidate is a dot at zero; the others are intervals with a dot inside.
        x: list[float | None] = [0.0]
        symbols, mode, label, side = ["circle"], "markers+text", value, "middle right"
        if row["figures"][metric] is None:
            mode = "text"
        elif row["difference"] is not None and row["interval"] is None:
            mode, label = "text", f"{value}, too few examples"
        elif low > high_end:
            x, mode, label, side = [high_end], "text", f"{value}, far off", "middle left"
        elif high < low_end:
            x, mode, label = [low_end], "text", f"{value}, far off"
        elif row["interval"] is not None:
            x, mode = [row["difference"], None, low, high], "lines+markers+text"
            symbols = ["circle", "circle", "line-ns-open", "line-ns-open"]
            hover += f"; {number(low)} to {number(high)}"
        traces.append(
            go.Scatter(
                x=x,
                y=[i] * len(x),
                mode=mode,
                line={"color": colour, "width": 2},
                marker={"color": colour, "size": 11, "symbol": symbols},
                text=[""] * (len(x) - 1) + [_text(label + " ✓ promoted" * is_winner)],
                textposition=side,
                hovertext=_text(hover),
                hoverinfo="text",
                cliponaxis=False,
                showlegend=False,
            )
        )
    about = (
        f"On {promoted['validation_examples']:,} validation examples. Where an interval covers "
        "zero, the data do not separate the candidate from the best one; the simplest of these "
        "candidates is promoted."
    )
    x_title = f"{metric} minus that of the best candidate, {promoted['confidence']:.0%} interval"
    plot = _figure(traces, x_title, "", height=90 + 34 * len(rows))
    plot.update_xaxes(range=[low_end, high_end])
    _name_rows(plot, [row["name"] for row in rows])
    plot.add_vline(x=0, line={"color": QUIET, "dash": "dash", "width": 1})
    return Plot("Candidates", about, f"Candidates: {x_title}", _json(plot))


def gain_and_retention(promoted: Record) -> Plot | None:
    """The deciding figure against the divergence from the base, for every candidate."""
    metric = promoted["metric"]
    finite = _finite_candidates(promoted)
    rows = [row for row in finite if row["figures"].get("retention_kl") is not None]
    if len(rows) < 2:
        return None
    rows.sort(key=lambda row: (row["name"] == promoted["winner"], row["figures"]["retention_kl"]))
    won = [row["name"] == promoted["winner"] for row in rows]
    xs = [row["figures"]["retention_kl"] for row in rows]
    ys = [row["figures"][metric] for row in rows]
    colours = [FAMILY[min(row["simplicity"], len(FAMILY) - 1)] for row in rows]
    trace = go.Scatter(
        x=xs,
        y=ys,
        mode="markers+text",
        marker={"color": [WON if w else c for w, c in zip(won, colours, strict=True)], "size": 12},
        text=[_text(row["name"] + " ✓ promoted" * w) for row, w in zip(rows, won, strict=True)],
        # Neighbours are labelled above and below, points near the right edge on the left.
        textposition=[
            f"{'top' if i % 2 else 'bottom'} {'left' if x > 0.7 * max(xs) else 'right'}"
            for i, x in enumerate(xs)
        ],
        hovertext=[
            _text(f"{row['name']}: {metric} {number(y)}, KL {number(x)}")
            for row, x, y in zip(rows, xs, ys, strict=True)
        ],
        hoverinfo="text",
        cliponaxis=False,
        showlegend=False,
    )
    return _plot(
        "Gain and retention",
        "What was learned against what was forgotten: further right, more forgotten.",
        [trace],
        "KL from the base on the general set (nats per token)",
        f"{metric} (validation)",
        log_y=_wide(ys),
    )


def alpha_curve(promoted: Record) -> Plot | None:
    """WiSE-FT: the deciding figure between the base and the fine-tuned model."""
    points = _alphas(promoted)
    if len(points) < 3:
        return None
    metric = promoted["metric"]
    ys = [row["figures"][metric] for _, row in points]
    won = [row["name"] == promoted["winner"] for _, row in points]
    hover = []
    for _, row in points:
        kl = row["figures"].get("retention_kl")
        beside = "" if kl is None else f", KL from the base {number(kl)}"
        hover.append(_text(f"{row['name']}: {metric} {number(row['figures'][metric])}{beside}"))
    trace = go.Scatter(
        x=[alpha for alpha, _ in points],
        y=ys,
        mode="lines+markers+text",
        line={"color": BEST, "width": 2},
        marker={
            "color": [WON if w else BEST for w in won],
            "size": [14 if w else 8 for w in won],
        },
        text=["promoted" * w for w in won],
        textposition="top center",
        hovertext=hover,
        hoverinfo="text",
        cliponaxis=False,
        showlegend=False,
    )
    return _plot(
        "WiSE-FT",
        "Between the base and the fine-tuned model.",
        [trace],
        "alpha: 0 is the base, 1 the fine-tuned model",
        f"{metric} (validation)",
        log_y=_wide(ys),
    )


def rungs(facts: Facts) -> Plot | None:
    """every trial's value at each rung; a ring where it was stopped."""
    search = facts.config.search
    scheduler = search.scheduler if search else None
    if scheduler is None or not facts.is_sweep:
        return None
    longest = max((trial.examples for trial in facts.trials), default=0)
    levels = SCHEDULERS[scheduler.name].rungs(scheduler, longest)
    at = [_reached(facts, level) for level in levels]
    shown = [
        (i, *one)
        for i, reached in enumerate(at)
        for one in sorted(reached, key=lambda each: each[0].id == facts.best)
    ]
    if not shown:
        return None
    trace = go.Scatter(
        x=[i for i, *_ in shown],
        y=[value for _, _, value, _ in shown],
        mode="markers",
        marker={
            "color": [
                BEST if trial.id == facts.best else STATUS.get(trial.status, QUIET)
                for _, trial, _, _ in shown
            ],
            "symbol": ["circle" if goes_on else "circle-open" for *_, goes_on in shown],
            "size": 10,
            "line": {"width": 2},
        },
        hovertext=[
            _text(f"{trial.id} ({trial.status}): {number(value)} at {levels[i]:,}. {_short(trial)}")
            for i, trial, value, _ in shown
        ],
        hoverinfo="text",
        showlegend=False,
    )
    values = [value for _, _, value, _ in shown]
    figure = _figure([trace], "examples at the rung", facts.metric, log_y=_wide(values))
    figure.update_xaxes(
        tickvals=list(range(len(levels))),
        ticktext=[f"{level:,}" for level in levels],
        range=[-0.3, len(levels) - 0.2],
    )
    for i, reached in enumerate(at):
        on = sum(goes_on for *_, goes_on in reached)
        figure.add_vline(
            x=i,
            line={"color": QUIET, "dash": "dash", "width": 1},
            annotation={"text": f"{on} of {len(reached)} went on", "font": {"size": 10}},
            annotation_position="top right",
        )
    about = "A ring is a trial that was stopped there, a dot one that went on."
    label = f"Rungs: {facts.metric} by examples at the rung"
    return Plot("Rungs", about, label, _json(figure))


def times(facts: Facts) -> Plot | None:
    """The duration of every trial, in the colour of its status."""
    trials = [trial for trial in facts.trials if trial.wall_s > 0]
    if len(trials) < 2:
        return None
    traces = []
    for status in dict.fromkeys(trial.status for trial in trials):
        rows = [(i, trial) for i, trial in enumerate(trials) if trial.status == status]
        traces.append(
            go.Bar(
                orientation="h",
                x=[trial.wall_s for _, trial in rows],
                y=[i for i, _ in rows],
                width=0.6,
                name=status.replace("_", " "),
                marker={"color": STATUS.get(status, QUIET)},
                hovertext=[
                    _text(
                        f"{trial.id} ({status}): {seconds(trial.wall_s)}, "
                        f"{trial.examples:,} examples"
                    )
                    for _, trial in rows
                ],
                hoverinfo="text",
                showlegend=True,
            )
        )
    figure = _figure(traces, "seconds", "", height=110 + 20 * len(trials))
    figure.update_layout(barmode="overlay")
    _name_rows(figure, [trial.id for trial in trials])
    return Plot("Time", _spent(facts), "Time: seconds of each trial", _json(figure))


def search_plots(facts: Facts) -> list[Plot]:
    """Optuna's plots of a sweep; its trials are those of result.json, so no study is opened."""
    search = facts.config.search
    if search is None or not facts.is_sweep:
        return []
    import optuna
    from optuna import visualization

    found: dict[str, Any] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # experimental features, and parameters with one value
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        study = _study(facts, search.metrics[:1], [facts.mode])
        if len(study.trials) >= 2:
            title = f"Parameters and {facts.metric}"
            found[title] = visualization.plot_parallel_coordinate(study, target_name=facts.metric)
        completed = [trial.id for trial in facts.trials if trial.status != "pruned"]
        finished = _study(facts, search.metrics[:1], [facts.mode], completed)
        if len(finished.trials) >= FEWEST:
            title = f"Importance of parameters (completed trials, {len(finished.trials)})"
            found[title] = visualization.plot_param_importances(finished, target_name=facts.metric)
        if 2 <= len(search.metrics) <= 3:
            several = _study(facts, search.metrics, search.modes)
            if several.trials:
                found["Pareto front"] = visualization.plot_pareto_front(
                    several, target_names=search.metrics
                )
    for figure in found.values():
        _style(figure, 380)
        figure.update_layout(title=None, showlegend=False)
    return [Plot(title, "", title, _json(figure)) for title, figure in found.items()]


def _study(
    facts: Facts, metrics: list[str], modes: Sequence[str], only: list[str] | None = None
) -> Any:
    """A study in memory; a pruned trial has the value of its last evaluation."""
    import optuna
    from optuna.trial import TrialState, create_trial

    from raytune_ft.search.space import distributions, encode

    search = facts.config.search
    assert search is not None
    study = optuna.create_study(
        directions=["minimize" if m == "min" else "maximize" for m in modes]
    )
    lines = distributions(search.space)
    for trial in facts.trials:
        values = _values(trial, metrics)
        if values is None or (only is not None and trial.id not in only):
            continue
        encoded = encode(search.space, trial.params)
        study.add_trial(
            create_trial(
                state=TrialState.COMPLETE,
                params=encoded,
                distributions={name: lines[name] for name in encoded},
                values=values,
            )
        )
    return study


def _values(trial: Trial, metrics: list[str]) -> list[float] | None:
    found = [trial.value] if len(metrics) == 1 else [(trial.values or {}).get(m) for m in metrics]
    kept = [value for value in found if value is not None and math.isfinite(value)]
    return kept if len(kept) == len(metrics) else None


def lengths(facts: Facts) -> Plot | None:
    """How long the examples of each split are, and where `data.max_length` cuts them."""
    data, limit, traces = facts.data or {}, facts.config.data.max_length, list[Any]()
    for place, (name, split) in enumerate(data.get("splits", {}).items()):
        highs, counts = zip(*split.get("lengths") or [(0, 0)], strict=True)
        bounds = list(pairwise((0, *highs)))
        traces.append(
            go.Bar(
                x=[(low + 1 + high) / 2 for low, high in bounds],
                width=[high - low for low, high in bounds],
                y=[count / split["examples"] for count in counts],
                name=_text(name),
                marker={"color": COLOURS[place % len(COLOURS)]},
                opacity=0.5,
                hovertext=[
                    _text(f"{name}: {count:,} examples of {low + 1:,} to {high:,} tokens")
                    for (low, high), count in zip(bounds, counts, strict=True)
                ],
                hoverinfo="text",
                showlegend=True,
            )
        )
    if not any(sum(trace.y) for trace in traces):
        return None
    figure = _figure(traces, "tokens of an example", "share of the split")
    figure.update_layout(barmode="overlay", yaxis_tickformat=".0%")
    figure.add_vline(x=limit + 0.5, line={"color": QUIET, "dash": "dash"})
    sources = data.get("sources", {}).values()
    cut, gone = (sum(one.get(key, 0) for one in sources) for key in ("truncated", "dropped"))
    about = (
        f"Tokens of each example, of pairs those of the longer answer. data.max_length={limit} "
        f"(dashed) cut {cut:,} rows and dropped {gone:,}."
    )
    label = "Lengths: share of the examples of each split by their tokens"
    return Plot("Lengths", about, label, _json(figure))


def _line(
    points: Sequence[tuple[float, float]],
    colour: str,
    name: str,
    hover: str,
    width: float = 1.2,
    markers: int = 5,
) -> Any:
    """A line in the legend under `name`; pointing at one of its points shows `hover`."""
    return go.Scatter(
        x=[x for x, _ in points],
        y=[y for _, y in points],
        mode="lines+markers" if markers else "lines",
        line={"color": colour, "width": width},
        marker={"color": colour, "size": markers} if markers else None,
        name=_text(name),
        legendgroup=_text(name),
        showlegend=True,
        hovertext=[_text(f"{hover}: {number(y)} after {x:,.0f} examples") for x, y in points],
        hoverinfo="text",
    )


def _plot(title: str, about: str, traces: list[Any], x: str, y: str, log_y: bool) -> Plot:
    return Plot(title, about, f"{title}: {y} by {x}", _json(_figure(traces, x, y, log_y=log_y)))


def _figure(traces: list[Any], x: str, y: str, height: int = 320, log_y: bool = False) -> Any:
    """The traces with titles of both axes; a legend below where a trace asks for it."""
    figure = _style(go.Figure(traces), height)
    figure.update_xaxes(title={"text": _text(x), "font": {"size": 12}}, zeroline=False)
    figure.update_yaxes(title={"text": _text(y), "font": {"size": 12}}, zeroline=False)
    if log_y:
        figure.update_yaxes(type="log")
    if any(trace.showlegend for trace in traces):
        below = {"orientation": "h", "yref": "container", "y": 0, "yanchor": "bottom"}
        figure.update_layout(legend={**below, "traceorder": "reversed"}, margin_b=75)
    return figure


def _style(figure: Any, height: int) -> Any:
    """As wide as the page leaves it, on the page's own background."""
    figure.update_layout(
        margin={"l": 60, "r": 30, "t": 20, "b": 50},
        height=height,
        paper_bgcolor="rgba(0,0,0,0)",
        font={"family": "system-ui, sans-serif", "color": "#475569"},
    )
    figure.update_yaxes(automargin=True)
    return figure


def _name_rows(figure: Any, names: Sequence[str]) -> None:
    """Names in place of the numbers 0, 1, ... of the y axis, from the top."""
    figure.update_yaxes(
        tickvals=list(range(len(names))),
        ticktext=[
            _text(name if len(name) <= MAX_NAME else f"{name[: MAX_NAME - 1]}…") for name in names
        ],
        range=[len(names) - 0.3, -0.7],
        showgrid=False,
    )


def _text(text: str) -> str:
    """Plain text for plotly, which reads a subset of HTML."""
    return html.escape(text, quote=False)


def _json(figure: Any) -> str:
    content = json.loads(figure.to_json())
    content["layout"].pop("template", None)  # 7 KB of defaults that are not used
    return json.dumps(content)


def _points(trial: Trial, metric: str) -> list[tuple[float, float]]:
    return [
        (each["examples"], each[metric])
        for each in trial.evaluations
        if each.get(metric) is not None and math.isfinite(each[metric])
    ]


def _reached(facts: Facts, level: int) -> list[tuple[Trial, float, bool]]:
    """Trials that reached a rung, their value there, and whether they went on."""
    found = []
    for trial in facts.trials:
        points = [(x, y) for x, y in _points(trial, facts.metric) if x >= level]
        if points:
            x, value = points[0]
            found.append((trial, value, trial.examples > x or trial.status == "completed"))
    return found


def _ends_to_show(rows: Sequence[Record]) -> list[float]:
    """Zero and the ends of intervals, without those so far off that they would squeeze the rest."""
    reaches = sorted(_reach(row["interval"]) for row in rows if row["interval"])
    limit = FAR * reaches[len(reaches) // 2] if reaches else 0.0
    near = [row["interval"] for row in rows if row["interval"] and _reach(row["interval"]) <= limit]
    return [0.0, *(end for interval in near for end in interval)]


def _finite_candidates(promoted: Record) -> list[Record]:
    """Those whose deciding figure is finite, for axes on which the others have no place."""
    metric = promoted["metric"]
    return [row for row in promoted["candidates"] if row["figures"][metric] is not None]


def _reach(interval: Sequence[float]) -> float:
    return max(map(abs, interval))


def _alphas(promoted: Record) -> list[tuple[float, Record]]:
    """Interpolations by alpha, with the base at 0 and the trial that they start from at 1."""
    rows = _finite_candidates(promoted)
    between = [(float(row["settings"]["alpha"]), row) for row in rows if "alpha" in row["settings"]]
    if not between:
        return []
    ends = [(float(row["simplicity"]), row) for row in rows if row["simplicity"] in (0, 1)]
    known = {alpha for alpha, _ in between}
    points = [*between, *(end for end in ends if end[0] not in known)]
    return sorted(points, key=lambda point: point[0])


def _wide(values: Sequence[float]) -> bool:
    """Whether a logarithmic axis shows the values better."""
    return min(values) > 0 and max(values) > SPAN * min(values)


def _thinned(steps: Sequence[Record]) -> list[Record]:
    every = max(1, len(steps) // MAX_POINTS)
    return list(steps[::every])


def _short(trial: Trial) -> str:
    """Its parameters by the last parts of their names."""
    return params_text({name.rpartition(".")[2]: value for name, value in trial.params.items()})


def _spent(facts: Facts) -> str:
    total = sum(trial.wall_s for trial in facts.trials)
    examples = sum(trial.examples for trial in facts.trials)
    text = f"{examples:,} examples in {seconds(total)} of trials"
    makespan = facts.result.get("makespan_s")
    if makespan:
        text += f", {seconds(makespan)} from start to end ({facts.result.get('execution')})"
    gpus = facts.config.parallel.resources["GPU"]
    if gpus and facts.result.get("execution") != "packed":
        hours = total * gpus * facts.config.parallel.max_workers / 3600
        text += f", {hours:,.2f} GPU hours"
    return text + "."
