"""`report.html` of a run or a sweep: one file, every text from data or config escaped."""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

import raytune_ft
from raytune_ft.report.collect import Facts, collect
from raytune_ft.report.curves import learning_curves, rungs, source_curves, times
from raytune_ft.report.sections import cards, commands, figures, headline, kind, lineage, trial_rows
from raytune_ft.report.verdicts import alpha_curve, forest, gain_and_retention
from raytune_ft.rundir import write_text_atomic

REPORT = "report.html"
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
