"""DeepSpeed in the workers of Ray Train, which have no launcher's environment."""

from __future__ import annotations

from pathlib import Path

import pytest

from raytune_ft.ray_backend.run_handle import fit
from raytune_ft.rundir import RunSpec
from tests.ray.conftest import Inputs, assert_nothing_left
from tests.support.runs import largest_difference, run

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.mark.parametrize(("stage", "workers"), [(3, 2), (2, 1)])
def test_the_numbers_are_those_of_one_process(
    inputs: Inputs, tmp_path: Path, stage: int, workers: int
) -> None:
    run(inputs.config(), tmp_path / "single" / "run")
    config = inputs.config(
        parallel__strategy="deepspeed",
        parallel__workers=workers,
        parallel__zero_stage=stage,
        parallel__offload="optimizer",
    )
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    assert fit(RunSpec(config, run_dir, inputs.data_dir)).status == "completed"
    assert max(largest_difference(run_dir, tmp_path / "single" / "run")) < 1e-5
    assert_nothing_left()
