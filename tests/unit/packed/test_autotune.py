"""How many slots an engine gets."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import count, repeat
from pathlib import Path
from typing import Any

import pytest

from raytune_ft.packed import autotune as packed_fit
from raytune_ft.packed.autotune import (
    MOST_TRIES,
    fewest_near_best,
    fixed_tokens,
    seconds_a_token,
    worth_trying,
)
from tests.support.packed import Packed
from tests.support.runs import largest_difference, make_config, make_inputs, run


@pytest.mark.parametrize(
    ("most", "step_tokens", "expected"),
    [
        (16, 100, [1, 2, 4, 8, 16]),
        (6, 100, [1, 2, 4, 6]),
        (16, 300, [1, 2, 4]),
        (1, 100, [1]),
        (16, 5000, [1]),  # a step of one fills a pass
    ],
)
def test_what_is_tried(most: int, step_tokens: int, expected: list[int]) -> None:
    assert worth_trying(most, step_tokens, 2000) == expected


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        ({1: 8.0, 2: 5.0, 4: 3.0, 8: 2.0, 16: 1.95}, 8),
        ({1: 8.0, 2: 5.0, 4: 3.0, 8: 2.0, 16: 1.5}, 16),
        ({1: 1.04, 2: 1.0, 4: 1.2}, 1),
        ({1: 1.0}, 1),
    ],
)
def test_as_few_as_are_about_as_good(seconds: dict[int, float], expected: int) -> None:
    assert fewest_near_best(seconds) == expected


class Machine:
    """A pass takes `fixed` seconds and 0.01 a slot, and waits for others as `waits` says."""

    def __init__(self, fixed: float, waits: Iterable[float]) -> None:
        self.fixed, self.waits = fixed, iter(waits)
        self.now, self.tried = 0.0, list[int]()

    def one_pass(self, count: int) -> int:
        self.tried.append(count)
        self.now += self.fixed + 0.01 * count + next(self.waits)
        return 10 * count

    def measure(self, counts: Sequence[int]) -> dict[int, float] | None:
        return seconds_a_token(self.one_pass, counts, lambda value: value, lambda: self.now)


def test_an_idle_machine_is_measured_three_times() -> None:
    machine = Machine(0.02, repeat(0.0))
    found = machine.measure([1, 2, 4])
    assert machine.tried == [*[1, 1, 2, 2, 4, 4], *[1, 2, 4] * 2]
    assert found == {1: pytest.approx(0.003), 2: pytest.approx(0.002), 4: pytest.approx(0.0015)}


def test_what_takes_long_is_not_tried_with_more_slots() -> None:
    machine = Machine(0.285, repeat(0.0))
    found = machine.measure([1, 2, 4])
    assert machine.tried == [*[1, 1, 2, 2], *[1, 2] * 2]  # 0.3 s with 2
    assert found == {1: pytest.approx(0.0295), 2: pytest.approx(0.01525)}


def test_a_step_that_takes_long_is_compared_with_nothing() -> None:
    machine = Machine(9.0, repeat(0.0))
    assert machine.measure([1, 2, 4]) == {1: pytest.approx(0.901)}
    assert machine.tried == [1, 1, 1]


@pytest.mark.parametrize(
    "waits",
    [
        [5.0, 5.0, *[0.0] * 40],  # in a warm-up, and in one pass
        [0.0, *[0.4, 0.0, 0.2, 0.15, 0.0, 0.0, 0.3, 0.25] * 6],
        [0.0, *[0.1] * 5, *[0.0] * 40],  # in the whole first round
    ],
)
def test_a_machine_that_is_busy_for_a_moment_is_measured_again(waits: list[float]) -> None:
    found = Machine(0.02, waits).measure([1, 2, 4])
    assert found == {1: pytest.approx(0.003), 2: pytest.approx(0.002), 4: pytest.approx(0.0015)}


def test_what_the_first_pass_of_a_shape_costs_is_not_measured() -> None:
    """As on a GPU, where it loads and chooses kernels for seconds."""
    machine = Machine(0.02, [6.0, 0.0, 5.0, 0.0, 4.0, *[0.0] * 40])
    found = machine.measure([1, 2, 4])
    assert machine.tried == [*[1, 1, 2, 2, 4, 4], *[1, 2, 4] * 2]
    assert found == {1: pytest.approx(0.003), 2: pytest.approx(0.002), 4: pytest.approx(0.0015)}


def test_a_machine_that_stays_busy_gives_no_times() -> None:
    machine = Machine(0.02, (0.013 * 1.3 ** (i % 17) for i in count()))
    assert machine.measure([1, 2, 4]) is None
    assert machine.tried.count(1) == 1 + MOST_TRIES


SHORT: dict[str, Any] = {"train.max_examples": 40, "train.eval_every_examples": 20}


def test_slots_that_were_tried_out_are_as_new(tmp_path: Path) -> None:
    config = make_config(*make_inputs(tmp_path / "inputs"), SHORT)
    packed = Packed(config, tmp_path, slots=6)
    told = packed.engine.passes.settle(None, measured=True)
    slots = packed.engine.passes.slots
    assert 1 <= slots <= 6
    assert told.startswith(f"{slots} slot")
    if "busy" not in told:
        assert "a token takes" in told
        assert "us with 1, " in told
    assert packed.engine.free == slots
    packed.enter("a", config)
    packed.finish(1)
    run(config, tmp_path / "alone")
    assert max(largest_difference(tmp_path / "a", tmp_path / "alone")) < 1e-5


def test_on_a_busy_machine_slots_are_as_planned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("raytune_ft.packed.engine.seconds_a_token", lambda *_: None)
    config = make_config(*make_inputs(tmp_path / "inputs"), SHORT)
    packed = Packed(config, tmp_path, slots=3)
    assert packed.engine.passes.settle(None, measured=True).startswith("3 slots (as planned: ")
    assert packed.engine.free == 3


def test_nothing_is_measured_where_one_step_fills_a_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr("raytune_ft.packed.engine.seconds_a_token")
    full = {**SHORT, "train.micro_tokens": 64}
    packed = Packed(make_config(*make_inputs(tmp_path / "inputs"), full), tmp_path, slots=3)
    told = packed.engine.passes.settle(None, measured=True)
    assert told == "1 slot (the step of one trial fills a pass)"
    assert packed.engine.free == 1


def test_memory_bounds_slots(tmp_path: Path) -> None:
    config = make_config(*make_inputs(tmp_path / "inputs"), SHORT)
    packed = Packed(config, tmp_path, slots=6)
    passes = packed.engine.passes
    assert passes.settle(2**40, measured=False) == "6 slots (as written)"
    base = sum(4 * parameter.numel() for parameter in passes.stack.model.parameters())
    of_slot = 4 * passes.stack.numbers * packed_fit.COPIES["cpu"]
    assert passes.settle(base + 7 * of_slot, measured=False) == "3 slots (memory holds 3)"
    assert passes.settle(1, measured=False) == "1 slot (memory holds 1)"
    assert packed.engine.free == 1
    packed.enter("a", config)
    assert packed.finish(1) == ["a"]


def test_an_adapter_that_some_trials_cannot_have_stops_nobody(tmp_path: Path) -> None:
    config = make_config(*make_inputs(tmp_path / "inputs"), SHORT)
    odd = config.model_copy(
        update={"method": config.method.model_copy(update={"targets": ["nothing"]})}
    )
    packed = Packed(odd, tmp_path, slots=3)
    assert "names no layer" in packed.engine.passes.settle(None, measured=True)
    assert packed.engine.free == 3
    packed.enter("a", config)
    assert packed.finish(1) == ["a"]


@pytest.mark.parametrize(
    ("launches_s", "a_token_s", "expected"),
    [
        (0.04, 80e-6, 500),  # a model of 8B on an H100
        (0.04, 5e-6, 8000),  # of 0.5B
        (0.0, 80e-6, 0),
        (0.04, 1e-9, 16384),  # the device is never full
        (0.04, 0.0, 16384),
    ],
)
def test_the_cost_of_a_pass_is_that_of_so_many_tokens(
    launches_s: float, a_token_s: float, expected: int
) -> None:
    passes = {float(n): launches_s + n * a_token_s for n in (300, 640, 1200, 2500)}
    found = fixed_tokens(passes, 16384)
    assert found == pytest.approx(expected, abs=1)
    noisy = {n: taken * (1 + 0.01 * (-1) ** i) for i, (n, taken) in enumerate(passes.items())}
    assert fixed_tokens(noisy, 16384) == pytest.approx(expected, rel=0.5, abs=60)
    assert fixed_tokens({300.0: launches_s}, 16384) is None


def test_an_engine_lays_passes_out_by_what_it_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A slow launch is shared by many tokens; the numbers stay those of a run alone."""
    config = make_config(*make_inputs(tmp_path / "inputs"), SHORT | {"data.packing": False})
    used = []
    for launch in (0.0, 1000.0):
        monkeypatch.setattr(
            "raytune_ft.packed.engine.seconds_a_token",
            lambda one_pass, counts, _, launch=launch: {
                count: (launch + tokens) / tokens
                for count in counts[:2]
                for tokens in [one_pass(count)]
            },
        )
        packed = Packed(config, tmp_path / f"{launch}", slots=2)
        told = packed.engine.passes.settle(None, measured=True)
        fixed = packed.engine.passes.fixed
        assert told.endswith(f"; a pass costs {fixed:,} more)")
        used.append(fixed)
        packed.enter("a", config)
        packed.finish(1)
    assert used == [0, 1000]
    run(config, tmp_path / "alone")
    for launch in (0.0, 1000.0):
        assert max(largest_difference(tmp_path / f"{launch}" / "a", tmp_path / "alone")) < 1e-5
