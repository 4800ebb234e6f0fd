"""`report.html` of a run or a sweep: one file that needs no network."""

from __future__ import annotations

import base64
import functools
import gzip
import hashlib
import math
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

import raytune_ft
from raytune_ft.config.metrics import direction
from raytune_ft.config.objectives import REWARD
from raytune_ft.files import write_text_atomic
from raytune_ft.format import cell, interval, number
from raytune_ft.layout import REPORT
from raytune_ft.report import tables
from raytune_ft.report.collect import Facts, Record, collect
from raytune_ft.report.plots import plots, search_plots

GOOD, NEUTRAL, BAD = "#059669", "#d97706", "#dc2626"
CLEARLY = 2
"""Standard errors; less may be chance."""
MAX_CARDS = 6
MAX_SAMPLES = 8


def write_report(directory: Path) -> Path:
    """Write `directory/report.html` from what the run or sweep has written so far.

    Raises:
        StorageError: the directory is not one of a run or a sweep.
    """
    path = directory / REPORT
    write_text_atomic(path, render(collect(directory)))
    return path


def try_report(directory: Path, tell: Callable[[str], None]) -> None:
    """`write_report` at the end of a command: an error is printed, and the command succeeds."""
    try:
        write_report(directory)
    except Exception as error:  # noqa: BLE001 - a plot must not fail the run that it shows
        tell(f"report.html was not written: {type(error).__name__}: {error}")


def render(facts: Facts) -> str:
    """The page; every text of data, config or models is escaped."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    shown, searched = plots(facts), search_plots(facts)
    figures = [plot.figure for plot in (*shown, *searched)]
    promoted = facts.promoted
    draw = (Path(__file__).parent / "page.js").read_text(encoding="utf-8")
    script = Markup(draw)  # nosec B704 # a file of this package
    return environment.get_template("page.html").render(
        name=facts.config.name,
        kind=_kind(facts),
        headline=headline(facts),
        cards=_cards(promoted) if promoted else [],
        plots=shown,
        search_plots=searched,
        plots_json=_script_safe("[" + ",".join(figures) + "]"),
        plotly=_packed(_plotly()) if figures else "",
        draw=script,
        policy=_policy(*([draw, _plotly()] if figures else [])),
        figures=tables.figures(promoted) if promoted else None,
        measured_on=tables.measured_on(promoted) if promoted else "",
        tones=_tones(promoted) if promoted else {},
        samples=promoted["samples"][:MAX_SAMPLES] if promoted else [],
        trials=tables.trials(facts.result["trials"], facts.best, facts.metric, detailed=True)
        if facts.is_sweep
        else None,
        usage=tables.usage(facts.trials),
        commands=_commands(facts),
        lineage=tables.Table(("", ""), tuple(_lineage(facts)), words=2),
        config_text=facts.config_text,
        version=raytune_ft.__version__,
    )


def headline(facts: Facts) -> Record:
    """The verdict: `title`, `lines` below it, and `colour`."""
    found = _headline(facts)
    return {**found, "lines": [*found["lines"], *overoptimised(facts)]}


def overoptimised(facts: Facts) -> list[str]:
    """A sentence for each reward that is only watched and fell while the trained one rose: it ended
    below the base, or lost more than half of what it had gained (arXiv 2210.10760), by more than
    `CLEARLY` standard errors of the difference between two independent means.
    """
    trial = facts.best_trial
    rows = [row for row in trial.evaluations if REWARD.name in row] if trial else []
    if len(rows) < 2:
        return []
    first, last = rows[0], rows[-1]
    watched = [
        each.called
        for each in facts.config.rewards
        if each.weight == 0 or each.called in facts.config.train.watch
    ]
    found = []
    for name in watched:
        key = f"{REWARD.name}:{name}"
        known = [row for row in rows if row.get(key) is not None]
        if len(known) < 2 or None in (first[REWARD.name], last[REWARD.name]):
            continue
        best = max(known, key=lambda row: float(row[key]))
        start, peak, end = known[0][key], best[key], known[-1][key]
        lost = peak - end > (peak - start) / 2 > 0 and _fell(name, best, known[-1])
        if (lost or _fell(name, known[0], known[-1])) and last[REWARD.name] > first[REWARD.name]:
            found.append(
                f"The trained reward rose from {number(first[REWARD.name])} to "
                f"{number(last[REWARD.name])}, while {name}, which is only watched, was at "
                f"{number(peak)} after step {best['step']} and ended at {number(end)}: the model "
                "has learnt what the reward measures, and not what it stands for."
            )
    return found


def _fell(name: str, before: Record, after: Record) -> bool:
    """Whether a reward is clearly lower in the later one of two evaluations."""
    key, error = f"{REWARD.name}:{name}", f"{REWARD.name}_error:{name}"
    noise = math.hypot(before.get(error) or 0.0, after.get(error) or 0.0)
    return bool(before[key] - after[key] > CLEARLY * noise)


def _headline(facts: Facts) -> Record:
    status = facts.result["status"]
    if facts.promoted is not None:
        return _verdict(facts.promoted)
    best = facts.result.get("best")
    if best is None:
        title = "Still running" if status == "running" else f"No usable result: {status}"
        lines = [str(facts.result["error"])] if facts.result.get("error") else []
        return {"title": title, "lines": lines, "colour": NEUTRAL if status == "running" else BAD}
    base = (facts.result.get("base") or {}).get(facts.metric)
    value = None if facts.best_trial is None else facts.best_trial.value
    title = f"{facts.metric} {cell(value)}" + (f", base {number(base)}" if base is not None else "")
    return {
        "title": f"{title} (validation)",
        "lines": [
            "Nothing was promoted yet: these are validation scores, which also selected the "
            "checkpoint, so they are optimistic."
        ],
        "colour": NEUTRAL,
    }


def _verdict(promoted: Record) -> Record:
    metric, winner, reference = promoted["metric"], promoted["winner"], promoted["reference"]
    old, new = promoted["base"][metric], promoted["promoted"][metric]
    gap = promoted["differences"][metric]
    if winner == "base":
        title, colour = "The base is kept: no candidate is better", NEUTRAL
    elif promoted["improved"]:
        title, colour = f"{winner} is promoted: {metric} {number(old)} → {number(new)}", GOOD
    elif _covers_zero(gap["interval"]):
        title = f"{winner} is promoted, tied with the {reference} on {promoted['split']}"
        colour = NEUTRAL
    else:
        title, colour = f"{winner} is promoted, and worse than the {reference}", BAD
    lines = tables.caveats(promoted)
    if winner != "base":
        sure = f"{promoted['confidence']:.0%} interval {interval(gap['interval'])}"
        lines.insert(
            0,
            f"Difference to the {reference} {number(gap['difference'])}"
            f"{f' ({sure})' * (gap['difference'] is not None)}, on {tables.measured_on(promoted)}.",
        )
    if promoted["tied"]:
        best = next(
            row["name"]
            for row in promoted["candidates"]
            if row["difference"] is None and row["figures"][metric] is not None
        )
        lines.append(
            f"Tied on validation: {best} has a better value than {winner} there, but the interval "
            "of their difference covers zero, so the simpler one was promoted."
        )
    return {"title": title, "lines": lines, "colour": colour}


def _kind(facts: Facts) -> str:
    """`sweep of 12 trials · model, method`, for the page's first line."""
    config = facts.config
    model = config.model.path.rstrip("/").rpartition("/")[2]
    what = f"sweep of {len(facts.trials)} trials" if facts.is_sweep else "run"
    return f"{what} · {model}, {config.method.name}"


def _cards(promoted: Record) -> list[dict[str, str]]:
    """The most important figures, the deciding one first, each beside that of the reference."""
    measured = promoted["promoted"]
    order = dict.fromkeys([promoted["metric"], *tables.key_figures(measured), *measured])
    found = []
    for name in list(order)[:MAX_CARDS]:
        old = promoted["base"].get(name)
        note = "" if old is None else f"{promoted['reference']} {number(old)}"
        if name == "retention_kl":
            note = "nats per token from the base, on the general set"
        found.append(
            {
                "label": name.replace("_", " "),
                "value": number(promoted["promoted"][name]),
                "note": note,
                "tone": _tone(name, promoted) if name != "retention_kl" else "",
            }
        )
    return found


def _tones(promoted: Record) -> dict[tuple[int, int], str]:
    """Row and column of `tables.figures` -> the tone of a difference."""
    return {(row, 3): _tone(name, promoted) for row, name in enumerate(promoted["promoted"])}


def _tone(name: str, promoted: Record) -> str:
    """`up` for an improvement, `down` for a loss, empty where the interval covers zero."""
    gap = promoted["differences"].get(name)
    mode = promoted["mode"] if name == promoted["metric"] else direction(name)
    if gap is None or mode is None or _covers_zero(gap["interval"]):
        return ""
    return "up" if (gap["difference"] < 0) == (mode == "min") else "down"


def _covers_zero(ends: Sequence[float] | None) -> bool:
    return ends is None or ends[0] <= 0 <= ends[1]


def _commands(facts: Facts) -> str:
    """Commands that repeat the run or sweep from the config on the page."""
    name = shlex.quote(f"name={facts.config.name}-again")
    verb = "sweep" if facts.is_sweep else "train"
    lines = [
        "# save the config below as config.yaml",
        f"raytune-ft {verb} config.yaml {name}",
    ]
    if not facts.is_sweep:
        lines.append(f"raytune-ft promote {shlex.quote(facts.config.storage)}/{name[5:]}")
    return "\n".join(lines)


def _lineage(facts: Facts) -> list[tuple[str, str]]:
    """Base model, seed and hashes of config and data."""
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


def _script_safe(text: str) -> Markup:
    """JSON whose strings cannot end the script element that holds it."""
    for char, code in (("<", "\\u003c"), (">", "\\u003e"), ("&", "\\u0026")):
        text = text.replace(char, code)
    return Markup(text)  # nosec B704 # what could end the script is escaped


def _policy(*scripts: str) -> str:
    """The page's content security policy: these scripts run and no other, and nothing is fetched.

    plotly puts styles into the page, which can therefore not be listed.
    """
    digests = [hashlib.sha256(script.encode()).digest() for script in scripts]
    allowed = [f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests] or ["'none'"]
    return (
        f"default-src 'none'; script-src {' '.join(allowed)}; "
        "style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
    )


@functools.cache
def _plotly() -> str:
    from plotly.offline import get_plotlyjs

    return str(get_plotlyjs())


@functools.cache
def _packed(script: str) -> str:
    """For the page to unpack: plotly is 2 MB as gzip in base64 instead of 5."""
    return base64.b64encode(gzip.compress(script.encode(), 9, mtime=0)).decode()
