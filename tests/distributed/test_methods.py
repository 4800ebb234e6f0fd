"""One contract for every method: it learns, its layout does not show, it resumes, and what it
leaves is read by transformers and PEFT alone.

What cannot be run is refused, and docs/methods.md says so; `make methods-table` writes it there.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from raytune_ft.config.methods import METHODS
from raytune_ft.config.rules import check
from raytune_ft.config.schema import Config
from raytune_ft.config.strategies import STRATEGIES
from raytune_ft.errors import ConfigError
from raytune_ft.merge.fold import fold
from raytune_ft.merge.fold import held_out as fold_examples
from tests.support.distributed import run_distributed, run_in_new_processes
from tests.support.methods import (
    ABSENT,
    FLOAT32_ONLY,
    ON_ACTIVATIONS,
    SMALL,
    VARIANTS,
    held_out,
    is_served,
    plain_loss,
    small_config,
    support_table,
)
from tests.support.models import true_float64
from tests.support.runs import (
    BrokenRun,
    Recorder,
    evaluations,
    final_weights,
    largest_difference,
    losses,
    make_inputs,
    run,
)

ROW_BY_ROW = {"data__packing": False, "train__micro_tokens": 1}
NAMES = [*SMALL, *VARIANTS]
BOUNDS = {"float64": 1e-9, "float32": 1e-5}  # of losses, evaluations and weights
DEEPSPEED_BOUND = 1e-5  # its masters are float32, also where the model is float64
PACKED = {"data__packing": "auto", "train__micro_tokens": 96}


def _absent(name: str) -> list[pytest.MarkDecorator]:
    return [pytest.mark.skipif(name in ABSENT, reason="not installed")]


def _named(name: str) -> Any:
    return pytest.param(name, marks=_absent(name))


class Workshop:
    """Runs of every method, each made when it is first asked for."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.inputs = make_inputs(root / "inputs")

    def config(self, name: str, precision: str, **changes: Any) -> Config:
        return small_config(name, self.inputs, train__precision=precision, **changes)

    def reference(self, name: str, precision: str) -> Path:
        """One process, one example after another."""
        directory = self.root / f"{name}-{precision}"
        if not (directory / "result.json").is_file():
            train(self.config(name, precision, **ROW_BY_ROW), directory, "single")
        return directory

    def exact(self, name: str) -> str:
        """The widest precision that a method has."""
        return "float32" if name in FLOAT32_ONLY else "float64"

    def last(self, name: str, precision: str = "float32") -> Path:
        """Its last checkpoint."""
        return sorted((self.reference(name, precision) / "checkpoints").glob("step-*"))[-1]


def train(config: Config, directory: Path, strategy: str) -> Any:
    """On every rank."""
    wide = config.train.precision == "float64"
    with true_float64() if wide else nullcontext():
        result = run(config, directory, strategy)
    assert result.status == "completed", result.error
    return result


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workshop]:
    """With one thread, which is faster for models so small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield Workshop(tmp_path_factory.mktemp("methods"))
    torch.set_num_threads(threads)


def test_every_method_has_a_small_config() -> None:
    assert SMALL.keys() | ON_ACTIVATIONS.keys() == METHODS.keys()


def test_the_page_has_the_table() -> None:
    page = Path(__file__).parents[2] / "docs" / "methods.md"
    assert f"<!-- matrix -->\n{support_table()}<!-- /matrix -->" in page.read_text(), (
        "run `make methods-table`"
    )


@pytest.mark.parametrize("name", [*map(_named, SMALL)])
def test_it_learns(workshop: Workshop, name: str) -> None:
    directory = workshop.reference(name, workshop.exact(name))
    assert evaluations(directory)[-1] < evaluations(directory)[0] - 0.01
    assert len(losses(directory)) == 12


# `test_two_processes` packs those of `fsdp`.
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[*_absent(name), *[pytest.mark.slow] * is_served(name, "fsdp")])
        for name in NAMES
    ],
)
def test_packed_rows_are_the_rows(workshop: Workshop, name: str, tmp_path: Path) -> None:
    precision = workshop.exact(name)
    result = train(workshop.config(name, precision, **PACKED), tmp_path / "run", "single")
    reference = workshop.reference(name, precision)
    assert max(largest_difference(tmp_path / "run", reference)) < BOUNDS[precision]
    assert result.notes == ()


def _runs(name: str, strategy: str) -> bool:
    return name not in ABSENT and is_served(name, strategy)


def _train_all(workshop: Workshop, root: Path, strategy: str) -> None:
    for name in NAMES:
        if _runs(name, strategy):
            config = workshop.config(name, workshop.exact(name), **PACKED)
            assert train(config, root / name, strategy).notes == ()  # rows were packed


def _compare_all(workshop: Workshop, root: Path, strategy: str) -> None:
    for name in NAMES:
        precision = workshop.exact(name)
        if _runs(name, strategy):
            found = largest_difference(root / name, workshop.reference(name, precision))
            bound = DEEPSPEED_BOUND if strategy == "deepspeed" else BOUNDS[precision]
            assert max(found) < bound, (name, found)


@pytest.mark.distributed
@pytest.mark.parametrize("strategy", [pytest.param("ddp", marks=pytest.mark.slow), "fsdp"])
def test_two_processes(workshop: Workshop, strategy: str, tmp_path: Path) -> None:
    run_distributed(_train_all, 2, workshop, tmp_path, strategy)
    _compare_all(workshop, tmp_path, strategy)


@pytest.mark.parametrize(
    ("name", "strategy"),
    [(name, each) for name in NAMES for each in STRATEGIES if not is_served(name, each)],
)
def test_a_strategy_that_cannot_is_refused(workshop: Workshop, name: str, strategy: str) -> None:
    with pytest.raises(ConfigError, match=f"{strategy}.*; write parallel.strategy: "):
        check(workshop.config(name, "float32", parallel__strategy=strategy))


@pytest.mark.slow
@pytest.mark.distributed
def test_deepspeed(workshop: Workshop, tmp_path: Path) -> None:
    run_in_new_processes(_train_all, 2, workshop, tmp_path, "deepspeed")
    _compare_all(workshop, tmp_path, "deepspeed")


@pytest.mark.parametrize(
    "name",
    [
        *("full", "lora"),
        *(
            pytest.param(name, marks=[pytest.mark.slow, *_absent(name)])
            for name in NAMES
            if name not in ("full", "lora")
        ),
    ],
)
def test_a_broken_run_goes_on_as_if_nothing_had_been(
    workshop: Workshop, name: str, tmp_path: Path
) -> None:
    config = workshop.config(name, "float32", checkpoint__asynchronous=False, **ROW_BY_ROW)
    with pytest.raises(BrokenRun):
        run(config, tmp_path / "run", reporter=Recorder(fail_at=9))
    run(config, tmp_path / "run", resumes=True)
    reference = workshop.reference(name, "float32")
    ours, theirs = final_weights(tmp_path / "run"), final_weights(reference)
    assert losses(tmp_path / "run") == losses(reference)
    assert ours.keys() == theirs.keys()
    assert all((ours[key] == theirs[key]).all() for key in ours)


@pytest.mark.parametrize("name", [*map(_named, NAMES)])
def test_what_it_leaves_is_read_by_transformers_and_peft(
    workshop: Workshop, name: str, tmp_path: Path
) -> None:
    config, checkpoint = workshop.config(name, "float32"), workshop.last(name)
    split = held_out(config, workshop.root / "cache")
    measured = evaluations(workshop.reference(name, "float32"))[-1]
    loss = plain_loss(workshop.inputs[0], checkpoint, split, in_4_bits=name == "qlora")
    assert loss == pytest.approx(measured, abs=1e-5)
    if name == "qlora":  # folded into the base that it was rounded from
        measured = plain_loss(workshop.inputs[0], checkpoint, split)
    fold(config.model, checkpoint, tmp_path / "model", fold_examples(split))
    assert (tmp_path / "model" / "config.json").is_file()
    loss = plain_loss(workshop.inputs[0], tmp_path / "model", split)
    assert loss == pytest.approx(measured, abs=1e-5)
