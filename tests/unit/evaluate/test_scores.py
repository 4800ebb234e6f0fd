"""Intervals against scipy's bootstrap, and the verdicts that they lead to."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import bootstrap

from raytune_ft.errors import ConfigError, RunFailed
from raytune_ft.evaluate.evaluate import Measured
from raytune_ft.evaluate.scores import Scores, difference
from raytune_ft.promote.decide import Contender, better, decide, evaluation_of, score_lines
from raytune_ft.records import as_json, to_json
from raytune_ft.report import tables


def losses(values: np.ndarray) -> Scores:
    return Scores((values, np.full(len(values), 4.0)), "min")


def test_the_interval_is_that_of_scipy() -> None:
    rng = np.random.default_rng(0)
    a = rng.normal(2.0, 1.0, 300)
    b = a + rng.normal(-0.05, 0.3, 300)
    mine = difference(Scores.mean(a.tolist()), Scores.mean(b.tolist()), draws=8000)
    theirs = bootstrap(
        (a, b),
        lambda a, b, axis: (b - a).mean(axis),
        paired=True,
        vectorized=True,
        method="percentile",
        n_resamples=8000,
        rng=1,
    ).confidence_interval
    assert mine.value == pytest.approx((b - a).mean())
    assert (mine.low, mine.high) == pytest.approx((theirs.low, theirs.high), abs=2e-3)
    # Paired: the two vary together, so that the interval is far narrower than without.
    assert mine.high - mine.low < 0.5 * 4 * a.std() / np.sqrt(300)


def test_a_loss_is_weighed_by_tokens_in_every_draw() -> None:
    tokens = np.array([1.0, 99.0] * 5)
    long_is_worse = Scores((np.array([1.0, 198.0] * 5), tokens), "min")
    even = Scores((np.array([1.0, 99.0] * 5), tokens), "min")
    found = difference(even, long_is_worse)
    assert found.value == pytest.approx(199 / 100 - 1)
    # Of ten examples two are long in one draw, eight in another.
    assert (found.low, found.high) == pytest.approx((198 / 206, 792 / 794))


def test_coverage_is_what_it_says() -> None:
    """Of 200 experiments without any difference, about 95% of the intervals hold zero."""
    rng = np.random.default_rng(3)
    covered = 0
    for trial in range(200):
        a, b = rng.normal(0, 1, (2, 80))
        found = difference(Scores.mean(a.tolist()), Scores.mean(b.tolist()), trial, draws=400)
        covered += found.covers_zero
    assert 180 <= covered <= 198


@pytest.mark.parametrize("count", [1, 9, 10])
def test_a_few_examples_tell_nothing(count: int) -> None:
    """Drawn from one, every draw is the same, and its interval would be a point."""
    base, new = np.full(count, 8.0), np.full(count, 4.0)
    found = difference(losses(base), losses(new))
    assert found.value == -1.0
    assert found.interval == ((-1.0, -1.0) if count == 10 else None)
    assert better(found, "min") == (count == 10)
    verdict = decide([contender("base", 0, base), contender("t1", 1, new)], "eval_loss")
    assert (verdict.best, verdict.winner) == ("t1", "t1" if count == 10 else "base")
    one, other = (Measured({"eval_loss": losses(each)}) for each in (base, new))
    both = [Contender("base", 0, one), Contender("t1", 1, other)]
    kept = evaluation_of(verdict, both, {"base": {}, "t1": {}}, "test", one, other, 1)
    gap = json.loads(to_json(kept))["differences"]["eval_loss"]
    assert gap == {"difference": -1.0, "interval": [-1.0, -1.0] if count == 10 else None}
    if count < 10:
        assert (
            kept.verdict == f"the base is kept: {count} examples are too few to tell on validation"
        )
    forced = evaluation_of(
        replace(verdict, winner="t1"), both, {"base": {}, "t1": {}}, "test", one, other, 1
    )
    few = f"not distinguishable from base (eval_loss 1.0000 against 2.0000, {count} examples are"
    assert (few in forced.verdict) == (count < 10)
    assert forced.improved == (count == 10)


def contender(name: str, simplicity: int, values: np.ndarray) -> Contender:
    return Contender(name, simplicity, Measured({"eval_loss": losses(values)}))


def test_the_simpler_one_wins_where_they_are_tied() -> None:
    rng = np.random.default_rng(0)
    base = rng.uniform(8, 12, 200)
    best = base - 4 + rng.normal(0, 0.1, 200)
    soup = best - 0.001 + rng.normal(0, 0.2, 200)
    soup -= soup.mean() - best.mean() + 0.001  # a little better, within the noise
    found = decide(
        [contender("base", 0, base), contender("t1", 1, best), contender("soup", 2, soup)],
        "eval_loss",
    )
    assert (found.best, found.winner, found.tied) == ("soup", "t1", True)
    assert found.differences["t1"].covers_zero
    assert not found.differences["base"].covers_zero
    # A soup that is better beyond the noise wins.
    found = decide(
        [contender("base", 0, base), contender("t1", 1, best), contender("soup", 2, best - 0.5)],
        "eval_loss",
    )
    assert (found.winner, found.tied) == ("soup", False)
    # And of two merges that are tied the better one.
    pair = [contender("a", 2, best - 0.5), contender("b", 2, best - 0.5001)]
    assert decide([contender("t1", 1, best), *pair], "eval_loss").winner == "b"


def test_the_base_wins_where_nothing_is_better() -> None:
    rng = np.random.default_rng(0)
    base = rng.uniform(8, 12, 50)
    worse = contender("t1", 1, base + rng.normal(1, 0.1, 50))
    found = decide([contender("base", 0, base), worse], "eval_loss")
    assert (found.winner, found.tied) == ("base", False)
    assert not better(found.differences["t1"], "min")
    same = contender("t1", 1, base)
    found = decide([contender("base", 0, base), same], "eval_loss")
    assert found.winner == "base"


def test_a_figure_that_nothing_gives_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"promote\.metric=arc/acc is not a figure"):
        decide([contender("base", 0, np.ones(3))], "arc/acc")


@pytest.mark.parametrize("strange", [np.nan, np.inf])
def test_a_candidate_whose_loss_is_not_finite_is_listed_and_loses(strange: float) -> None:
    losses_of = {name: np.full(20, value) for name, value in (("base", 2.0), ("t1", 1.0))}
    broken = np.where(np.arange(20) == 1, strange, 0.1)
    both = [contender(name, i, values) for i, (name, values) in enumerate(losses_of.items())]
    all_three = [*both, contender("soup", 2, broken)]
    verdict = decide(all_three, "eval_loss")
    assert (verdict.winner, verdict.best) == ("t1", "t1")
    base, promoted = (one.measured for one in both)
    record = as_json(evaluation_of(verdict, all_three, {}, "test", base, promoted, 1))
    assert record["candidates"][2]["figures"] == {"eval_loss": None}
    assert [row["difference"] for row in record["candidates"]] == [0.25, None, None]
    assert record["verdict"].endswith("; eval_loss of soup is not finite on validation")
    assert tables.candidates(record).rows[2] == ("soup", "not finite", "-", "-")
    kept = evaluation_of(
        decide([both[0], all_three[2]], "eval_loss"), all_three, {}, "test", base, base, 1
    )
    assert kept.verdict.startswith("the base is kept")
    assert "soup is not finite" in kept.verdict
    with pytest.raises(RunFailed, match="not finite for any candidate"):
        decide(all_three[2:], "eval_loss")
    # A held-out figure that is not finite is no improvement, whichever way is better.
    for mode in ("min", "max"):
        assert not better(difference(losses(broken), losses(losses_of["t1"])), mode)
    told = evaluation_of(verdict, all_three, {}, "test", all_three[2].measured, promoted, 1).verdict
    assert "against not finite, which leaves no difference to measure" in told


def test_an_example_of_weight_0_has_no_loss_of_its_own() -> None:
    weighted = Scores((np.array([0.0, 6.0]), np.array([0.0, 3.0])), "min")
    lines = score_lines("test", "base", Measured({"eval_loss": weighted}))
    assert [json.loads(line)["eval_loss"] for line in lines] == [None, 2.0]
