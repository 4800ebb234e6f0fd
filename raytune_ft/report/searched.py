"""Optuna's own plots of a search, as plotly's JSON; over a study in memory, made from the trials.

The trials are those of `result.json`, so that neither the study's file nor a server is needed.
"""

from __future__ import annotations

import json
import math
import warnings
from typing import Any

import optuna
from optuna.trial import TrialState, create_trial

from raytune_ft.report.collect import Facts, Trial
from raytune_ft.search.space import distributions, encode

FEWEST = 4
"""Completed trials from which importances are told."""


def optuna_plots(facts: Facts) -> dict[str, str]:
    """Title -> JSON of a plotly figure; none where there is nothing to plot or no plotly."""
    search = facts.config.search
    if search is None or not facts.is_sweep:
        return {}
    try:
        import plotly  # noqa: F401 - Optuna needs it
    except ImportError:
        return {}
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
        if len(search.metrics) > 1:
            several = _study(facts, search.metrics, search.modes)
            if 2 <= len(search.metrics) <= 3 and several.trials:
                found["Pareto front"] = visualization.plot_pareto_front(
                    several, target_names=search.metrics
                )
    return {title: _json(figure) for title, figure in found.items()}


def plotly_script() -> str:
    """plotly's own JavaScript, which draws the figures without a network."""
    from plotly.offline import get_plotlyjs

    return str(get_plotlyjs())


def _study(
    facts: Facts, metrics: list[str], modes: Any, only: list[str] | None = None
) -> optuna.Study:
    """The trials with a value. A pruned one has its value at the last evaluation."""
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
        params = encode(search.space, trial.params)
        study.add_trial(
            create_trial(
                state=TrialState.COMPLETE,
                params=params,
                distributions={name: lines[name] for name in params},
                values=values,
            )
        )
    return study


def _values(trial: Trial, metrics: list[str]) -> list[float] | None:
    found = [trial.value] if len(metrics) == 1 else [(trial.values or {}).get(m) for m in metrics]
    kept = [value for value in found if value is not None and math.isfinite(value)]
    return kept if len(kept) == len(metrics) else None


def _json(figure: Any) -> str:
    """Of a page's width, on the page's own background."""
    figure.update_layout(
        title=None,
        margin={"l": 60, "r": 40, "t": 40, "b": 50},
        height=380,
        paper_bgcolor="rgba(0,0,0,0)",
        font={"family": "system-ui, sans-serif"},
        showlegend=False,
    )
    figure.update_yaxes(automargin=True)
    content = json.loads(figure.to_json())
    content["layout"].pop("template", None)  # 7 KB of defaults that are not used
    return json.dumps(content)
