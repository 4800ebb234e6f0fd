"""The search section: what is refused, in one line, before anything is spent."""

from __future__ import annotations

import math
from typing import Any

import pytest

from raytune_ft.config.data import DataConfig, SourceConfig
from raytune_ft.config.load import apply_overrides, load_config
from raytune_ft.config.resolve import resolve
from raytune_ft.config.schema import Config
from raytune_ft.config.search_space import duration_s, parse_condition, trial_count
from raytune_ft.errors import ConfigError
from raytune_ft.records import EvalMetrics

CONFIG = Config(name="a", data=DataConfig(train=SourceConfig(path="/x.jsonl")))
LR, RANK = {"log_uniform": [1e-5, 1e-3]}, {"choice": [4, 8]}
NAME = {"choice": ["lora", "full"]}
SPACE = {"train.lr": LR, "method.rank": RANK}


def with_search(**search: Any) -> Config:
    return apply_overrides(CONFIG, {"search": {"space": SPACE, **search}})


@pytest.mark.parametrize(
    ("search", "message"),
    [
        ({"sampler": "grid"}, "search.space.train.lr is log_uniform, which has infinitely many"),
        (
            {"sampler": "grid", "space": {"seed": {"int_uniform": [0, 20_000]}}},
            "search.sampler=grid has over 10000 combinations; write fewer choices, or sampler: tpe",
        ),
        (
            {"sampler": "grid", "space": {"method.rank": RANK}, "first": [{"method.rank": 4}]},
            "search.first has no effect under search.sampler=grid",
        ),
        (
            {"sampler": "cmaes"},
            "search.space.method.rank is a choice, and search.sampler=cmaes supports only numbers",
        ),
        (
            {"sampler": "cmaes", "space": {"train.lr": LR}},
            "search.sampler=cmaes needs two lines of search.space; write sampler: tpe",
        ),
        ({"first": [{}]}, "search.first[0] is empty; write for example"),
        ({"first": [{"train.lrr": 1}]}, "search.first[0]: train.lrr is not a line of search.spa"),
        (
            {"first": [{"train.lr": 1e-4}, {"train.lr": 1.0}]},
            "search.first[1]: train.lr=1.0 is not within log_uniform: [1e-05, 0.001]; write",
        ),
        ({"first": [{"method.rank": 4.0}]}, "method.rank=4.0 is not within choice: [4, 8]"),
        ({"first": [{"train.lr": 1e-4}] * 3, "trials": 2}, "is less than the 3 points of search.f"),
        (
            {"space": {**SPACE, "method.name": NAME}, "first": [
                {"method.name": "full", "method.rank": 4}]},
            "search.first[0]: method.rank does not exist where method.name=full; delete one of",
        ),
        (
            {"first": [{"train.lr": 1e-4}], "constraints": ["train.lr > 0.0005"]},
            "search.first[0] does not meet train.lr > 0.0005; write a point that does",
        ),
        (
            {"space": {**SPACE, "method.rank": {**RANK, "when": {"train.lr": 1}}}},
            "search.space.method.rank.when: train.lr is not another choice of search.space; delete",
        ),
        (
            {"space": {**SPACE, "method.alpha": {"choice": [1.0], "when": {"method.rank": 5}}}},
            "search.space.method.alpha.when: method.rank=5 is none of its choices; write 4 or 8",
        ),
        (
            {"space": {"seed": {"choice": [1], "when": {"method.rank": 4}},
                       "method.rank": {**RANK, "when": {"seed": 1}}}},
            "search.space.seed.when depends on itself; delete one `when` of the circle",
        ),
        ({"space": {"method.name": NAME, "method.rank": {**RANK, "when": {"method.name": "full"}}}},
         "search.space.method.rank: method.rank is not a key of method full"),
        ({"constraints": ["train.lr * 2"]}, "search.constraints: train.lr * 2 compares nothing;"),
        ({"constraints": ["train.lr <"]}, "search.constraints: train.lr < is not a condition;"),
        ({"constraints": ["train.lrr < 1"]}, "which is not a line of search.space; did you mean"),
        ({"constraints": ["method.rank < 'a'"]}, "cannot be computed at method.rank="),
        ({"warm_start": "runs/a", "sampler": "random"}, "which learns nothing from it;"),
        ({"metric": ["eval_loss", "eval_loss"]}, "is empty or repeats a metric; write one metric"),
        (
            {"metric": ["eval_loss", "eval_exact_match"], "mode": ["min", "min"]},
            "search.mode=[min, min] looks for the worst eval_exact_match; write search.mode",
        ),
        ({"metric": ["eval_loss", "eval_exact_match"], "mode": "min"}, "does not give each of"),
        (
            {"metric": ["eval_loss", "eval_exact_match"], "sampler": "cmaes"},
            "search.sampler=cmaes supports one metric only; write sampler: tpe, gp or random",
        ),
        (
            {"metric": ["eval_loss", "eval_loss:general"]},
            "search.metric=eval_loss:general is not a figure of train.objective=sft; write eval_",
        ),
        ({"scheduler": {"name": "medain"}}, "search.scheduler.name=medain is not asha, hyperband"),
        (
            {"scheduler": {"name": "median", "reduction_factor": 3}},
            "search.scheduler.reduction_factor is not a key of scheduler median; the keys of",
        ),
        ({"scheduler": {"graze": 3}}, "search.scheduler.graze is not a key of scheduler asha;"),
        ({"budget": {"wall_s": "2 weeks"}}, "search.budget.wall_s=2 weeks is not a duration;"),
        ({"budget": {"wall_s": 0}}, "search.budget.wall_s=0 is not a number above 0 or text"),
        (
            {"constraints": ["train.lr > 1"]},
            "search.constraints: train.lr > 1 is met by none of 10,000 draws; widen search.space",
        ),
        (
            {"sampler": "grid", "space": {"method.rank": RANK}, "constraints": ["method.rank < 4"]},
            "method.rank < 4 is met by none of all points of the grid",
        ),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line(search: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        with_search(**search)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('x') == 0",
        "a.b() < 1",
        "a[0] < 1",
        "(lambda: 1) == 1",
        "9 ** 9 ** 9 > 1",
        "[a for a in b] == 1",
        "a if b else c < 1",
        "(a := 1) < 2",
        "a is None",
        "a in b",
        "'a'.b < 1",
        "1j < 2",
        "f'{a}' == 'b'",
        "a & 1 == 1",
        "not " * 200 + "a",
    ],
)
def test_nothing_but_the_language_is_taken(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^search\.constraints: "):
        parse_condition(text)


@pytest.mark.parametrize(
    ("text", "holds"),
    [
        ("a.b * 2 + 1 <= 9", True),
        ("1 < a.b < 4", False),
        ("a.b / 0 > 1", False),
        ("a.b // 3 == 1 and a.b % 3 == 1", True),
        ("c == 'x' or a.b == 5", True),
        ("not c != 'x'", True),
        ("-a.b < 0", True),
        ("d.e > 100", True),  # not in this trial
        ("c == 4", False),
    ],
)
def test_a_condition_is_computed(text: str, holds: bool) -> None:
    assert parse_condition(text).holds({"a.b": 4, "c": "x"}) is holds


@pytest.mark.parametrize("text", ["c + 1 > 0", "c * 9 == 1", "a.b < c", "-c < 1"])
def test_texts_are_no_numbers(text: str) -> None:
    with pytest.raises(ConfigError, match="cannot be computed at"):
        parse_condition(text).holds({"a.b": 4, "c": "x"})


def test_trials_are_what_is_written_or_sixteen_or_the_grid(tmp_path: Any) -> None:
    levels = {"method.rank": RANK, "train.batch_size": {"int_uniform": [8, 10]}}
    counts = [
        with_search(),
        with_search(trials=3),
        with_search(sampler="grid", space=levels),
        with_search(sampler="grid", space=levels, trials=4),
        with_search(sampler="grid", space=levels, trials=40),
    ]
    assert [trial_count(each.search) for each in counts if each.search] == [16, 3, 6, 4, 6]
    search = resolve(counts[2]).search
    assert search is not None
    assert search.trials == 6


def test_a_when_is_kept_by_files_and_overrides(tmp_path: Any) -> None:
    from raytune_ft.config.load import dump_yaml

    space = {**SPACE, "seed": {"choice": [1, 2], "when": {"method.rank": [4, 8]}}}
    written = with_search(space=space)
    file = tmp_path / "a.yaml"
    file.write_text(dump_yaml(written))
    assert load_config(file) == written
    changed = load_config(
        file, ["search.space.seed.int_uniform=[3, 5]", "search.space.seed.when={method.rank: 4}"]
    )
    assert changed.search is not None
    line = changed.search.space["seed"]
    assert (line.kind, line.values, line.when) == ("int_uniform", [3, 5], {"method.rank": 4})


def test_the_loss_of_a_source_is_a_metric_from_the_second_on() -> None:
    sources = [{"name": name, "path": f"/{name}.jsonl"} for name in ("maths", "general")]
    written = apply_overrides(CONFIG, {"data.validation": sources})
    metric = ["eval_loss", "eval_loss:general"]
    found = apply_overrides(written, {"search": {"space": SPACE, "metric": metric}}).search
    assert found is not None
    assert (found.metrics, found.modes) == (metric, ["min", "min"])
    with pytest.raises(ConfigError, match="begins with eval_loss:general, and trials are ranked"):
        apply_overrides(written, {"search": {"space": SPACE, "metric": metric[::-1]}})
    with pytest.raises(ConfigError, match="eval_loss:other is not a figure"):
        apply_overrides(
            written, {"search": {"space": SPACE, "metric": ["eval_loss", "eval_loss:other"]}}
        )
    point = EvalMetrics(1, 2, {"eval_loss": 3.0}, {"maths": 2.0, "general": 4.0})
    assert [point.value(name) for name in metric] == [3.0, 4.0]


def test_halving_leaves_a_third_at_each_rung() -> None:
    halving = {"name": "asha", "grace_examples": 100, "reduction_factor": 3}
    shares = []
    for scheduler in (halving, {**halving, "name": "hyperband"}, {"name": "median"}, None):
        search = with_search(scheduler=scheduler).search
        assert search is not None
        shares.append((search.cost_share(900), search.cost_share(100)))
    assert shares[0] == (pytest.approx((100 + 200 / 3 + 600 / 9) / 900), 1.0)
    assert shares[1:] == [(1.0, 1.0)] * 3


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90s", 90.0), ("3m", 180.0), ("1.5 h", 5400.0), ("2d", 172_800.0), (0.5, 0.5)],
)
def test_durations(text: str | float, seconds: float) -> None:
    assert duration_s(text) == seconds


@pytest.mark.parametrize(
    "text", ["", "3", "m", "-3m", "0s", "1e3s", "3m\n4s", "soon", math.inf, -1.0]
)
def test_what_is_no_duration(text: str | float) -> None:
    with pytest.raises(ConfigError, match=r"some\.key=.* is not a duration; write one such as 90s"):
        duration_s(text, "some.key")
