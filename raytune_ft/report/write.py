"""`report.html` of a run or a sweep: one file, every text from data or config escaped."""

from __future__ import annotations

import base64
import gzip
import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

import raytune_ft
from raytune_ft.config.metrics import FIGURES, OF_A_HEAD, RETENTION
from raytune_ft.config.metrics import figures as known_figures
from raytune_ft.files import write_text_atomic
from raytune_ft.layout import REPORT
from raytune_ft.report.collect import Facts, Record, collect
from raytune_ft.report.curves import (
    alpha_curve,
    forest,
    gain_and_retention,
    learning_curves,
    rungs,
    source_curves,
    times,
)
from raytune_ft.report.svg import shown

NONE = "-"
GOOD, NEUTRAL, BAD = "#059669", "#d97706", "#dc2626"


def kind(facts: Facts) -> str:
    """What the page is about, in a few words."""
    config = facts.config
    model = config.model.path.rstrip("/").rpartition("/")[2]
    what = f"{model}, {config.method.name}"
    if facts.is_sweep:
        return f"sweep of {len(facts.trials)} trials · {what}"
    return f"run · {what}"


def headline(facts: Facts) -> Record:
    """The verdict: title, lines, colour."""
    status, promoted = facts.result["status"], facts.promoted
    if promoted is not None:
        return _verdict(promoted)
    best = facts.result.get("best")
    if best is None:
        title = "Still running" if status == "running" else f"No usable result: {status}"
        lines = [str(facts.result["error"])] if facts.result.get("error") else []
        return {"title": title, "lines": lines, "colour": NEUTRAL if status == "running" else BAD}
    base = (facts.result.get("base") or {}).get(facts.metric)
    value = next((trial.value for trial in facts.trials if trial.id == facts.best), None)
    now = NONE if value is None else shown(value)
    title = f"{facts.metric} {now}" + (f", base {shown(base)}" if base is not None else "")
    return {
        "title": f"{title} (validation)",
        "lines": ["Nothing was promoted yet: these figures chose the checkpoint, and flatter."],
        "colour": NEUTRAL,
    }


def _verdict(promoted: Record) -> Record:
    metric, winner, reference = promoted["metric"], promoted["winner"], reference_of(promoted)
    old, new = promoted["base"][metric], promoted["promoted"][metric]
    gap = promoted["differences"][metric]
    sure = f"{promoted['confidence']:.0%} interval {_interval(gap['interval'])}"
    if winner == "base":
        title, colour = "The base is kept: no candidate is better", NEUTRAL
    elif promoted["improved"]:
        title, colour = f"{winner} is promoted: {metric} {shown(old)} → {shown(new)}", GOOD
    elif _covers_zero(gap["interval"]):
        title = f"{winner} is promoted, tied with the {reference} on {promoted['split']}"
        colour = NEUTRAL
    else:
        title, colour = f"{winner} is promoted, and worse than the {reference}", BAD
    times = "once" if promoted["looks"] == 1 else f"{promoted['looks']} times"
    lines = []
    if winner != "base":
        lines.append(
            f"Difference to the {reference} {shown(gap['difference'])} ({sure}), on "
            f"{promoted['examples']:,} examples of the {promoted['split']} split, measured {times}."
        )
    if reference != "base":
        lines.append("The constant gives every example the one answer that suits train best.")
    if promoted["split"] != "test":
        lines.append("There was no test data: these examples also chose the model, and flatter.")
    if promoted["tied"]:
        best = next(row["name"] for row in promoted["candidates"] if row["difference"] is None)
        lines.append(
            f"Tied on validation: {best} looks better than {winner} there, but the interval of "
            "their difference covers zero, so the simpler one was taken."
        )
    return {"title": title, "lines": lines, "colour": colour}


def cards(facts: Facts) -> list[dict[str, str]]:
    """The figures that matter, each with its change."""
    promoted = facts.promoted
    if promoted is None:
        return []
    order = [promoted["metric"], "answer_exact_match", "exact_match", "accuracy", "rougeL"]
    order += ["macro_f1", "r2", "pearson", "token_accuracy", "retention_kl", "retention_loss"]
    found = []
    for name in dict.fromkeys(order):
        if name not in promoted["promoted"]:
            continue
        gap = promoted["differences"].get(name)
        old = promoted["base"].get(name)
        note = "" if old is None else f"{reference_of(promoted)} {shown(old)}"
        if name == "retention_kl":
            note = "nats a token from the base, on the general set"
        found.append(
            {
                "label": name.replace("_", " "),
                "value": shown(promoted["promoted"][name]),
                "note": note,
                "tone": _tone(name, gap, promoted) if name != "retention_kl" else "",
            }
        )
    return found[:6]


def figures(promoted: Record) -> Record:
    """Every figure of base and promoted model with its interval."""
    rows = []
    for name, value in promoted["promoted"].items():
        gap = promoted["differences"].get(name)
        base = promoted["base"].get(name)
        rows.append(
            {
                "name": name,
                "base": NONE if base is None else shown(base),
                "promoted": shown(value),
                "difference": NONE if gap is None else shown(gap["difference"]),
                "interval": NONE if gap is None else _interval(gap["interval"]),
                "tone": _tone(name, gap, promoted),
            }
        )
    times = "once" if promoted["looks"] == 1 else f"{promoted['looks']} times"
    return {
        "about": f"On {promoted['examples']:,} examples of the {promoted['split']} split, measured "
        f"{times}. Intervals are of a paired bootstrap over examples.",
        "confidence": f"{promoted['confidence']:.0%}",
        "reference": reference_of(promoted),
        "rows": rows,
    }


def reference_of(promoted: Mapping[str, Any]) -> str:
    """What the promoted model is compared with."""
    return str(promoted.get("reference", "base"))  # absent in earlier versions


def trial_rows(facts: Facts) -> list[Record]:
    """The table of trials, the best marked."""
    if not facts.is_sweep:
        return []
    names = list(dict.fromkeys(name for trial in facts.trials for name in trial.params))
    return [
        {
            "id": trial.id,
            "status": trial.status.replace("_", " "),
            "error": trial.error,
            "best": trial.id == facts.best,
            "params": [_value(trial.params.get(name)) for name in names],
            "value": _value(trial.value),
            "examples": f"{trial.examples:,}",
            "seconds": f"{trial.wall_s:,.1f}",
        }
        for trial in facts.trials
    ]


def commands(facts: Facts) -> str:
    """How to get the same again, from the config that is part of the page."""
    name = shlex.quote(f"name={facts.config.name}-again")
    verb = "sweep" if facts.is_sweep else "train"
    lines = [
        "# save the config below as config.yaml",
        f"raytune-ft {verb} config.yaml {name}",
    ]
    if not facts.is_sweep:
        lines.append(f"raytune-ft promote {shlex.quote(facts.config.storage)}/{name[5:]}")
    return "\n".join(lines)


def lineage(facts: Facts) -> list[tuple[str, str]]:
    """What it was made from."""
    rows = [("base model", facts.config.model.path), ("seed", str(facts.config.seed))]
    if digest := facts.result.get("config_sha256"):
        rows.append(("config sha256", str(digest)))
    for split, source in ((facts.data or {}).get("sources") or {}).items():
        rows.append((f"data.{split}", f"{source['name']}, {source['rows']:,} rows"))
        rows.append((f"data.{split} sha256", source["sha256"]))
    for pair, count in ((facts.data or {}).get("overlaps") or {}).items():
        if count:
            rows.append((f"prompts of {pair} in both", f"{count:,}"))
    return rows


def _tone(name: str, gap: Record | None, promoted: Record) -> str:
    """up for an improvement, down for the contrary; nothing where the interval covers zero."""
    modes = {**known_figures(list(FIGURES)), **OF_A_HEAD["regression"], **RETENTION}
    mode = promoted["mode"] if name == promoted["metric"] else modes.get(name)
    if gap is None or mode is None or _covers_zero(gap["interval"]):
        return ""
    return "up" if (gap["difference"] < 0) == (mode == "min") else "down"


def _interval(ends: Sequence[float] | None) -> str:
    return "not known of so few examples" if ends is None else " to ".join(map(shown, ends))


def _covers_zero(ends: Sequence[float] | None) -> bool:
    return ends is None or ends[0] <= 0 <= ends[1]


def _value(value: Any) -> str:
    if value is None:
        return NONE
    return shown(value) if isinstance(value, float) else str(value)


MAX_SAMPLES = 8


def write_report(directory: Path) -> Path:
    """Make `directory/report.html` anew from what the run or sweep left so far.

    Raises:
        StorageError: it is no run or sweep, or cannot be read.
    """
    path = directory / REPORT
    write_text_atomic(path, render(collect(directory)))
    return path


def try_report(directory: Path, tell: Callable[[str], None]) -> None:
    """At the end of a command, whose work is done: what goes wrong here is told and no more."""
    try:
        write_report(directory)
    except Exception as error:  # noqa: BLE001 - a plot must not fail the run that it shows
        tell(f"report.html was not written: {type(error).__name__}: {error}")


def render(facts: Facts) -> str:
    """The page."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    plots, script = _searched(facts)
    promoted = facts.promoted or {}
    return environment.get_template("page.html").render(
        name=facts.config.name,
        kind=kind(facts),
        headline=headline(facts),
        cards=cards(facts),
        plots=_rows(facts),
        figures=figures(promoted) if promoted else None,
        interactive=list(plots),
        interactive_json=_script_safe("[" + ",".join(plots.values()) + "]"),
        plotly=script,
        samples=promoted.get("samples", [])[:MAX_SAMPLES],
        trials=trial_rows(facts),
        parameters=_parameters(facts),
        metric=facts.metric,
        commands=commands(facts),
        lineage=lineage(facts),
        config_text=facts.config_text,
        version=raytune_ft.__version__,
    )


def _rows(facts: Facts) -> list[list[dict[str, Any]]]:
    """Plots in rows of at most two; what has nothing to show is left out."""
    promoted = facts.promoted
    metric = facts.metric
    every = [
        (
            "Learning curves" if facts.is_sweep else "Learning curve",
            f"{metric} on the validation set.",
            learning_curves(facts),
        ),
        (
            "Sources",
            "Loss on the validation examples of each source"
            + (f", {facts.best}." if facts.is_sweep else "."),
            source_curves(facts),
        ),
    ]
    if promoted:
        count = f"{promoted['validation_examples']:,}"
        every.append(
            (
                "Candidates",
                f"On {count} validation examples. Where the bar covers zero, the data do not tell "
                "the candidate from the best one, and the simplest of those is promoted.",
                forest(promoted),
            )
        )
        every.append(
            (
                "Gain and retention",
                "What was learned against what was forgotten.",
                gain_and_retention(promoted),
            )
        )
        every.append(
            ("WiSE-FT", "Between the base and the fine-tuned model.", alpha_curve(promoted))
        )
    every.append(
        (
            "Rungs",
            "A ring is where a trial was stopped, a dot one that went on.",
            rungs(facts),
        )
    )
    every.append(("Time", _spent(facts), times(facts)))
    shown = [{"title": title, "about": about, "svg": svg} for title, about, svg in every if svg]
    return [shown[i : i + 2] for i in range(0, len(shown), 2)]


def _spent(facts: Facts) -> str:
    total = sum(trial.wall_s for trial in facts.trials)
    examples = sum(trial.examples for trial in facts.trials)
    text = f"{examples:,} examples in {total:,.0f} s of trials"
    makespan = facts.result.get("makespan_s")
    if makespan:
        text += f", {makespan:,.0f} s from start to end ({facts.result.get('execution')})"
    gpus = facts.config.parallel.resources_per_worker.get("GPU", 0.0)
    if gpus and facts.result.get("execution") != "packed":
        hours = total * gpus * facts.config.parallel.max_workers / 3600
        text += f", {hours:,.2f} GPU hours"
    return text + "."


def _parameters(facts: Facts) -> list[str]:
    return list(dict.fromkeys(name for trial in facts.trials for name in trial.params))


def _searched(facts: Facts) -> tuple[dict[str, str], str]:
    """Optuna's plots and what draws them. Of a run alone neither, and Optuna is not loaded."""
    if not facts.is_sweep:
        return {}, ""
    from raytune_ft.report.searched import optuna_plots, plotly_script

    plots = optuna_plots(facts)
    return plots, _packed(plotly_script()) if plots else ""


def _script_safe(text: str) -> Markup:
    """JSON that cannot end its script element, whatever the names in it."""
    json.loads(text)
    for char, code in (("<", "\\u003c"), (">", "\\u003e"), ("&", "\\u0026")):
        text = text.replace(char, code)
    return Markup(text)


def _packed(script: str) -> str:
    """gzip in base64: 2 MB instead of 5."""
    return base64.b64encode(gzip.compress(script.encode(), 9, mtime=0)).decode()
