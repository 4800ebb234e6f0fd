"""The plots hold the numbers of the files, and no text of theirs is read as HTML."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from raytune_ft.report import plots
from raytune_ft.report.collect import Facts, collect
from raytune_ft.report.plots import Plot


@pytest.fixture
def facts(sweep_dir: Path) -> Facts:
    return collect(sweep_dir)


def figure_of(plot: Plot | None) -> Any:
    assert plot is not None
    return json.loads(plot.figure)


def promoted(facts: Facts) -> Any:
    assert facts.promoted is not None
    return facts.promoted


def test_learning_curves(facts: Facts) -> None:
    lines = figure_of(plots.learning_curves(facts))["data"]
    assert len(lines) == 6
    assert lines[-1]["name"] == "trial-000, the best"  # drawn last, over the others
    assert (lines[-1]["x"], lines[-1]["y"]) == ([0, 100, 200, 300], [3.0, 1.0, 1.0, 1.0])
    assert lines[-1]["hovertext"][1].startswith("trial-000 (completed) lr=0.0100 rank=8")
    in_legend = [line["name"] for line in lines if line["showlegend"]]
    assert in_legend == ["pruned", "completed", "trial-000, the best"]
    nothing = [replace(trial, evaluations=[]) for trial in facts.trials]
    assert plots.learning_curves(replace(facts, trials=nothing)) is None


def test_a_wide_range_of_values_has_a_logarithmic_axis(facts: Facts) -> None:
    assert "type" not in figure_of(plots.learning_curves(facts))["layout"]["yaxis"]
    far = [{"examples": 0, "eval_loss": 300.0}, {"examples": 9, "eval_loss": float("inf")}]
    trials = [replace(facts.trials[0], evaluations=far), *facts.trials[1:]]
    drawn = figure_of(plots.learning_curves(replace(facts, trials=trials)))
    assert drawn["layout"]["yaxis"]["type"] == "log"
    assert drawn["data"][-1]["y"] == [300.0]  # what is not finite is left out


def test_source_curves(facts: Facts) -> None:
    assert plots.source_curves(facts) is None
    lines = [
        {"examples": n, "eval_loss": 1.0, "eval_loss_by_source": {"<b>": 1.0 - n / 10, "b": 2.0}}
        for n in (0, 5)
    ]
    trials = [replace(facts.trials[0], evaluations=lines), *facts.trials[1:]]
    plot = plots.source_curves(replace(facts, trials=trials))
    assert plot is not None
    assert plot.about == "Loss on the validation examples of each source, trial-000."
    first, second = figure_of(plot)["data"]
    assert (first["name"], first["y"], second["y"]) == ("&lt;b&gt;", [1.0, 0.5], [2.0, 2.0])


def test_lengths(facts: Facts) -> None:
    assert plots.lengths(replace(facts, data=None)) is None
    split = {"examples": 40, "lengths": [[100, 30], [200, 10]]}
    data = {
        "splits": {"<b>": split, "test": {"examples": 9, "lengths": [[7, 9]]}},
        "sources": {"train": {"truncated": 3, "dropped": 0}, "test": {"truncated": 1}},
    }
    plot = plots.lengths(replace(facts, data=data))
    drawn = figure_of(plot)
    train, test = drawn["data"]
    assert (train["name"], train["y"], train["width"]) == ("&lt;b&gt;", [0.75, 0.25], [100, 100])
    assert train["hovertext"][1] == "&lt;b&gt;: 10 examples of 101 to 200 tokens"
    assert (test["x"], test["width"], test["y"]) == ([4.0], [7], [1.0])
    limit = facts.config.data.max_length
    assert plot is not None
    assert f"data.max_length={limit} (dashed) cut 4 rows and dropped 0." in plot.about
    assert drawn["layout"]["shapes"][0]["x0"] == limit + 0.5
    assert plot in plots.plots(replace(facts, data=data))


def test_candidates(facts: Facts) -> None:
    drawn = figure_of(plots.candidates(promoted(facts)))
    axis = drawn["layout"]["yaxis"]
    assert axis["ticktext"] == ["base", "trial-000", "wise_ft-0.5", "uniform_soup"]
    base, winner, _, best = drawn["data"]
    assert winner["x"] == pytest.approx([0.05, None, -0.05, 0.15])
    assert winner["text"][-1] == "1.0000 ✓ promoted"
    assert (best["x"], best["text"], base["text"][-1]) == ([0.0], ["0.9500"], "3.0000")
    # An interval far off is named at the edge, and does not squeeze the others.
    rows = [dict(row) for row in promoted(facts)["candidates"]]
    rows[0] |= {"difference": 50.0, "interval": [49.0, 51.0]}
    drawn = figure_of(plots.candidates(promoted(facts) | {"candidates": rows}))
    assert drawn["data"][0]["text"] == ["3.0000, far off"]
    assert drawn["layout"]["xaxis"]["range"][1] < 2
    assert plots.candidates(promoted(facts) | {"candidates": rows[:1]}) is None


def test_gain_and_retention(facts: Facts) -> None:
    (points,) = figure_of(plots.gain_and_retention(promoted(facts)))["data"]
    assert (points["x"], points["y"]) == ([0.0, 1.0, 1.5, 0.5], [3.0, 1.6, 0.95, 1.0])
    assert points["text"][-1] == "trial-000 ✓ promoted"
    assert points["hovertext"][0] == "base: eval_loss 3.0000, KL 0.0000"


def test_alpha_curve(facts: Facts) -> None:
    (curve,) = figure_of(plots.alpha_curve(promoted(facts)))["data"]
    assert (curve["x"], curve["y"]) == ([0.0, 0.5, 1.0], [3.0, 1.6, 1.0])
    assert curve["text"] == ["", "", "promoted"]
    rows = [row for row in promoted(facts)["candidates"] if "alpha" not in row["settings"]]
    assert plots.alpha_curve(promoted(facts) | {"candidates": rows}) is None


def test_rungs(facts: Facts) -> None:
    drawn = figure_of(plots.rungs(facts))
    (points,) = drawn["data"]
    assert drawn["layout"]["xaxis"]["ticktext"] == ["100", "200"]
    assert points["x"] == [0] * 6 + [1] * 4
    assert points["marker"]["symbol"].count("circle-open") == 2
    assert points["hovertext"][5].startswith("trial-000 (completed): 1.0000 at 100. lr=0.0100")
    said = [note["text"] for note in drawn["layout"]["annotations"]]
    assert said == ["4 of 6 went on", "4 of 4 went on"]


def test_times(facts: Facts) -> None:
    plot = plots.times(facts)
    assert plot is not None
    assert plot.about == "1,400 examples in 30 s of trials, 12.5 s from start to end (packed)."
    completed, pruned = figure_of(plot)["data"]
    assert (completed["x"], completed["y"]) == ([6.0] * 4, [0, 2, 3, 5])
    assert pruned["hovertext"][0] == "trial-001 (pruned): 3 s, 100 examples"


def test_search_plots(facts: Facts) -> None:
    titles = [plot.title for plot in plots.search_plots(facts)]
    assert titles == [
        "Parameters and eval_loss",
        "Importance of parameters (completed trials, 4)",
    ]
    fewer = plots.search_plots(replace(facts, trials=facts.trials[:3]))
    assert [plot.title for plot in fewer] == titles[:1]
