"""Accelerators by name, and the memory of this machine."""

from __future__ import annotations

import pytest

from raytune_ft.errors import ConfigError
from raytune_ft.estimate import hardware
from raytune_ft.estimate.hardware import USABLE, key_of, named
from raytune_ft.format import GIB


def test_workers_may_share_an_accelerator() -> None:
    whole = named("H100", 1, 8, "bfloat16")
    half = whole.shared(0.5)
    assert (half.memory, half.tflops) == (40 * GIB, whole.tflops / 2)
    assert (whole.peak_tflops, half.peak_tflops) == (989, 989 / 2)
    assert half.usable == pytest.approx(40 * GIB * USABLE, abs=1)


def test_accelerators_are_known_by_name() -> None:
    found = named("h100", 2, 8, "bfloat16")
    assert (found.name, found.nodes, found.per_node) == ("H100", 2, 8)
    assert found.memory == 80 * GIB
    assert named("A10G", 1, 8, "bfloat16").memory == 22.5 * GIB  # without what ECC takes
    with pytest.raises(ConfigError, match=r"--accelerator=A100 is unknown.* A100-40G or A100-80G"):
        named("A100", 1, 8, "bfloat16")


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA A100-SXM4-80GB", "A100-40G"),  # both sizes compute alike
        ("AMD Instinct MI300X OAM", "MI300X"),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_accelerators_are_known_by_what_drivers_call_them(name: str, key: str | None) -> None:
    assert key_of(name) == key


def test_memory_of_this_machine_is_shared_by_its_workers() -> None:
    alone, shared = hardware.worker_memory(1, 0.0), hardware.worker_memory(4, 0.0)
    assert alone is not None
    assert shared is not None
    assert alone // 4 == pytest.approx(shared, abs=1)
