"""The texts and tables of the page, as plain values that the template escapes."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from raytune_ft.config.metrics import FIGURES, OF_A_HEAD, RETENTION
from raytune_ft.config.metrics import figures as known_figures
from raytune_ft.report.collect import Facts, Record
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
