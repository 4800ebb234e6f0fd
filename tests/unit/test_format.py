"""How numbers are written for people."""

from __future__ import annotations

from typing import Any

import pytest

from raytune_ft.format import cell, interval, params_text, seconds, size


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, "-"),
        (True, "True"),
        (1234567, "1,234,567"),
        ("all-linear", "all-linear"),
        (0.0, "0.0000"),
        (1614.05934, "1614.0593"),
        (-0.01, "-0.0100"),
        (0.00123456, "0.00123"),
        (1.234e-5, "1.23e-05"),
        (2e7, "2e+07"),
        (float("nan"), "not finite"),
    ],
)
def test_cells(value: Any, expected: str) -> None:
    assert cell(value) == expected


def test_intervals_and_parameters() -> None:
    assert interval((-0.5, 0.25)) == "-0.5000 to 0.2500"
    assert interval(None) == "too few examples"
    assert params_text({"train.lr": 0.000123456, "method.rank": 8}) == (
        "train.lr=0.000123 method.rank=8"
    )


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (None, "0 bytes"),
        (1023, "1,023 bytes"),
        (1024, "1.0 KiB"),
        (5 * 1024**3, "5.0 GiB"),
        (2000 * 1024**4, "2,000.0 TiB"),
    ],
)
def test_sizes(count: int | None, expected: str) -> None:
    assert size(count) == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [(0.0025, "2.5 ms"), (40, "40 s"), (119.9, "120 s"), (700, "12 min"), (11100, "3.1 h")],
)
def test_durations(value: float, expected: str) -> None:
    assert seconds(value) == expected
