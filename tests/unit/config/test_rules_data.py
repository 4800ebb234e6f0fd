"""Sources, mixtures and curricula in a config: what is refused, searched and hashed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from raytune_ft.config.data import DataConfig, source_configs, source_names
from raytune_ft.config.execution import choose_execution
from raytune_ft.config.identity import check_resume, config_sha256
from raytune_ft.config.load import dump_yaml, load_config
from raytune_ft.config.resolve import resolve
from raytune_ft.config.schema import Config
from raytune_ft.errors import ConfigError

Load = Callable[..., Config]
ONE = "{path: a.jsonl}"
TWO = "[{path: dir/a.jsonl, %s}, {name: b, path: dir/a.jsonl, %s}]"
PLAIN = "[{path: a.jsonl}, {path: b.jsonl}]"


@pytest.fixture
def load(tmp_path: Path) -> Load:
    def load(data: str, *overrides: str, more: str = "") -> Config:
        path = tmp_path / "config.yaml"
        path.write_text(f"name: x\ndata: {{{data}}}\n{more}")
        return load_config(path, overrides)

    return load


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("train: []", "data.train=[] names no source; write at least one"),
        (
            "train: [{path: x/a.jsonl}, {path: y/a.json}]",
            "data.train: a is the name of 2 sources; give each another name, for example name: a-2",
        ),
        ("train: [{path: a.jsonl, name: a.b}]", "data.train.a.b.name=a.b is not"),
        ("train: [{path: a.jsonl, wieght: 1}]", "did you mean data.train.0.weight?"),
        ("train: [{name: b, path: a.jsonl, wieght: 1}]", "did you mean data.train.b.weight?"),
        ("train: [{path: a.jsonl}, {name: b}]", "data.train.b.path is missing; write text"),
        ("train: [{path: a.jsonl}, 5]", "data.train="),
        (
            "train: {path: a.jsonl, weight: 1}",
            "data.train.weight is not a key; it is a key of one of several sources",
        ),
        (
            f"train: {TWO % ('weight: 1', 'weight: -1')}",
            "data.train.b.weight=-1 is not a number of at least 0",
        ),
        (
            f"train: {TWO % ('weight: 1', 'epochs: 2')}",
            "data.train.b.epochs=2 does not go with data.train.a.weight=1",
        ),
        (
            "train: [{path: a.jsonl, weight: 1, epochs: 2}]",
            "data.train.a.epochs=2 does not go with data.train.a.weight=1; write weights for all",
        ),
        (
            "train: [{path: a.jsonl, weight: 1}, {path: b.jsonl}]",
            "data.train.b has no weight, and other sources have one",
        ),
        (f"train: {TWO % ('weight: 0', 'weight: 0')}", "weight=0 of every source leaves nothing"),
        (f"train: {TWO % ('epochs: 0', 'epochs: 0')}", "epochs=0 of every source leaves nothing"),
        (f"train: {ONE}, mixture: {{temperature: 2}}", "needs several sources, and data.train has"),
        (f"train: [{ONE}], mixture: {{}}", "needs several sources, and data.train has one"),
        (
            f"train: {PLAIN}, mixture: {{temperature: 0}}",
            "data.mixture.temperature=0 is not a number above 0",
        ),
        (
            f"train: {TWO % ('weight: 1', 'weight: 2')}, mixture: {{temperature: 2}}",
            "data.mixture.temperature=2 decides on shares, and so does weight of data.train",
        ),
        (
            f"train: {TWO % ('epochs: 1', 'epochs: 2')}, mixture: {{examples: 100}}",
            "data.mixture.examples=100 decides on the length of a pass",
        ),
        (f"train: {PLAIN}, mixture: {{examples: longer}}", "did you mean longest?"),
        (
            f"train: {ONE}, curriculum: {{by: column}}",
            "data.curriculum.column=null does not go with data.curriculum.by=column",
        ),
        (
            f"train: {ONE}, curriculum: {{column: level}}",
            "data.curriculum.column=level does not go with data.curriculum.by=length",
        ),
        (f"train: {ONE}, curriculum: {{by: lenght}}", "did you mean length?"),
        (f"train: {ONE}, curriculum: {{start: 0}}", "data.curriculum.start=0 is not a number"),
        (f"train: {PLAIN}, test: [{{path: b.jsonl}}]", "data.test=b.jsonl is data.train too"),
        (f"train: {ONE}, validation: [{ONE}], test: {ONE}", "is data.validation too"),
    ],
)
def test_a_mistake_is_one_line(load: Load, data: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(data)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_sources_have_names(load: Load) -> None:
    data = load(
        "train: [{path: x/maths.v2.jsonl}, {path: org/chat set}], validation: 0.1, "
        "test: [{path: t/maths.jsonl}, {path: law.csv}]"
    ).data
    assert list(source_configs(data)) == [
        "train.maths",
        "train.chat-set",
        "test.maths",
        "test.law",
    ]
    assert source_names(data) == ("maths", "chat-set", "law")
    assert source_names(DataConfig.model_validate({"train": {"path": "a.jsonl"}})) == ()


def test_resolved_sources_are_absolute_and_named(load: Load, tmp_path: Path) -> None:
    config = resolve(load(f"train: {TWO % ('weight: 1', 'weight: 2')}"), cwd=tmp_path)
    assert isinstance(config.data.train, list)
    assert [source.name for source in config.data.train] == ["a", "b"]
    assert config.data.train[0].path == str(tmp_path / "dir" / "a.jsonl")
    (tmp_path / "again.yaml").write_text(dump_yaml(config))
    assert load_config(tmp_path / "again.yaml") == config


def test_a_source_is_overridden_by_its_name(load: Load) -> None:
    data = f"train: {TWO % ('weight: 1', 'weight: 2')}"
    for override in ("data.train.b.weight=5", "data.train.1.weight=5"):
        train = load(data, override).data.train
        assert isinstance(train, list)
        assert [source.weight for source in train] == [1, 5]
    for override, message in (
        ("data.train.c.weight=5", "names no source of data.train, which has a, b"),
        ("data.train.path=x.jsonl", "data.train is a list of sources; write data.train.NAME.KEY"),
    ):
        with pytest.raises(ConfigError) as caught:
            load(data, override)
        assert message in str(caught.value)


def test_a_space_holds_shares_and_schedules(load: Load) -> None:
    space = """search:
  space:
    data.train.b.weight: {choice: [0.0, 0.1]}
    data.curriculum.start: {choice: [0.1, 1.0]}
    data.mixture.examples: {choice: [total, shortest]}
"""
    data = f"train: {TWO % ('weight: 1', 'weight: 2')}, curriculum: {{}}"
    assert choose_execution(load(data, more=space))[0] == "packed"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("data.train.b.path: {choice: [x]}", "cannot be searched over"),
        ("data.train: {choice: [x]}", "cannot be searched over"),
        ("data.validation: {choice: [0.1]}", "cannot be searched over"),
        ("data.curriculum.by: {choice: [length]}", "cannot be searched over"),
        ("data.train.c.weight: {choice: [1]}", "names no source of data.train, which has a, b"),
        ("data.train.b.weight: {uniform: [-1, 1]}", "data.train.b.weight=-1.0 is not a number"),
        ("data.mixture.temperature: {uniform: [1, 5]}", "decides on shares, and so does weight"),
    ],
)
def test_what_a_space_may_not_hold(load: Load, line: str, message: str) -> None:
    data = f"train: {TWO % ('weight: 1', 'weight: 2')}, mixture: {{}}"
    with pytest.raises(ConfigError) as caught:
        load(data, more=f"search:\n  space:\n    {line}\n")
    assert message in str(caught.value)


def test_what_moves_weights_is_in_the_hash(load: Load) -> None:
    base = f"train: {TWO % ('weight: 1', 'weight: 2')}"
    first, second = "{path: a.jsonl, weight: 1}", "{path: b.jsonl, weight: 1}"
    texts = [
        base,
        f"train: {TWO % ('weight: 1', 'weight: 3')}",
        f"{base}, mixture: {{examples: 10}}",
        f"{base}, curriculum: {{}}",
        f"{base}, curriculum: {{order: hard_first}}",
        f"train: [{first}, {second}]",
        f"train: [{second}, {first}]",
    ]
    assert len({config_sha256(load(text)) for text in texts}) == len(texts)


def test_a_resume_names_the_source_that_differs(load: Load) -> None:
    before = load(f"train: {TWO % ('weight: 1', 'weight: 2')}")
    after = load(f"train: {TWO % ('weight: 1', 'weight: 3')}")
    with pytest.raises(ConfigError, match=r"data.train.1.weight=3.* \(the run has 2"):
        check_resume(before, after)


def test_a_budget_is_kept_where_the_curriculum_depends_on_it(load: Load) -> None:
    constant = ("train.lr_schedule=constant", "train.epochs=1")
    paced = "train: {path: a.jsonl}, curriculum: {schedule: linear}"
    before, after = load(paced, *constant), load(paced, *constant, "train.epochs=2")
    with pytest.raises(ConfigError, match="cannot change under a linear curriculum"):
        check_resume(before, after)
    assert config_sha256(before) != config_sha256(after)
    sorts = "train: {path: a.jsonl}, curriculum: {schedule: sort}"
    before, after = load(sorts, *constant), load(sorts, *constant, "train.epochs=2")
    check_resume(before, after)
    assert config_sha256(before) == config_sha256(after)
