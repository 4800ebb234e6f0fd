"""Candidates measured by actors of a cluster: the figures of one process, and nothing left."""

from __future__ import annotations

from pathlib import Path

import pytest

from raytune_ft.config.schema import Config, PromoteConfig
from raytune_ft.errors import DataError, ModelError
from raytune_ft.evaluate.evaluate import Job, run_job
from raytune_ft.promote.promote import measure_all
from raytune_ft.ray_backend import evaluate as ray_evaluate
from tests.ray.conftest import Inputs, assert_nothing_left
from tests.support.models import save_tiny_llama

pytestmark = pytest.mark.ray


def jobs(inputs: Inputs, directory: Path, settings: PromoteConfig) -> tuple[Config, list[Job]]:
    """Three models, more than the cluster has room for at a time."""
    config = inputs.config()
    made = []
    for seed in range(3):
        path = save_tiny_llama(directory / str(seed), seed)
        model = config.model.model_copy(update={"path": str(path)})
        made.append(Job(model, config.model, settings, inputs.data_dir, "validation"))
    return config, made


def test_actors_find_what_one_process_finds(inputs: Inputs, tmp_path: Path) -> None:
    settings = PromoteConfig(metrics=["loss", "rouge"], max_new_tokens=4)
    config, wanted = jobs(inputs, tmp_path, settings)
    assert ray_evaluate.joined()
    found = measure_all(wanted, config.parallel)
    assert_nothing_left()
    for job, one in zip(wanted, found, strict=True):
        alone = run_job(job)
        assert one.figures == pytest.approx(alone.figures, rel=1e-6)
        assert one.continuations == alone.continuations
    assert len({one.figures["eval_loss"] for one in found}) == 3


def test_an_error_of_ours_stays_one(inputs: Inputs, tmp_path: Path) -> None:
    config, wanted = jobs(inputs, tmp_path, PromoteConfig(metrics=["answer"], max_new_tokens=4))
    with pytest.raises(DataError, match="finds no answer in any of"):
        measure_all(wanted, config.parallel)
    (tmp_path / "1" / "model.safetensors").unlink()
    config, wanted = config, [wanted[1], wanted[1]]
    with pytest.raises(ModelError):
        measure_all(wanted, config.parallel)
    assert_nothing_left()
