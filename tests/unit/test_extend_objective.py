"""An objective of another package: one dict entry, and training, search and promotion use it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from raytune_ft.config.load import apply_overrides, dump_yaml
from raytune_ft.config.metrics import direction, label
from raytune_ft.config.objectives import LOSS, OBJECTIVES, Figure, ObjectiveFacts
from raytune_ft.config.schema import Config
from raytune_ft.config.train import TrainConfig
from raytune_ft.data.batch import MicroBatch
from raytune_ft.data.prepare import prepare_data
from raytune_ft.data.prepared import PreparedData
from raytune_ft.errors import ConfigError
from raytune_ft.model.load import load_tokenizer
from raytune_ft.model.objectives import TeacherOf, TokenObjective
from raytune_ft.model.objectives.tokens import token_losses
from raytune_ft.promote.promote import promote
from raytune_ft.rundir import RunSpec
from raytune_ft.train.report import Silent
from raytune_ft.train.run import run_training
from tests.support.runs import make_config, make_inputs, metrics

NAME = "confidence_penalty"


def entropies(logits_NV: Tensor) -> Tensor:
    logs_NV = logits_NV.log_softmax(-1)
    return -(logs_NV.exp() * logs_NV).sum(-1)


@dataclass(frozen=True)
class ConfidencePenalty(TokenObjective):
    """Cross entropy minus a tenth of the entropy (arXiv 1701.06548)."""

    def losses_of(self, logits_NV: Tensor, batch: MicroBatch) -> Tensor:
        return self.weighted(token_losses(logits_NV, batch) - 0.1 * entropies(logits_NV), batch)

    def values_of(self, logits_NV: Tensor, batch: MicroBatch) -> dict[str, Tensor]:
        return {**super().values_of(logits_NV, batch), "entropy": entropies(logits_NV)}


def build(train: TrainConfig, data: PreparedData, teacher_of: TeacherOf) -> ConfidencePenalty:
    return ConfidencePenalty()


ENTROPY = Figure("eval_entropy", "max", ("entropy", "tokens"), label="entropy in nats")
ENTRY = ObjectiveFacts(
    ("prompt_completion",), (LOSS, ENTROPY), implementation=lambda: build, smooth=False
)
SPACE = {"train.lr": {"choice": [0.1]}}
SEARCH: dict[str, Any] = {"metric": "eval_entropy", "scheduler": None, "space": SPACE}


@pytest.fixture
def config(tmp_path: Path) -> Iterator[Config]:
    """A config of the objective, which exists for as long as the test runs."""
    model, rows = make_inputs(tmp_path, examples=40)
    OBJECTIVES[NAME] = ENTRY
    changes = {
        "train.objective": NAME,
        "train.max_examples": 42,
        "train.eval_every_examples": 14,
        "promote.max_overlap": 1.0,
    }
    yield make_config(model, rows, changes)
    del OBJECTIVES[NAME]


def test_the_config_knows_it_while_it_is_there(config: Config) -> None:
    section = Config.model_json_schema()["$defs"]["TrainConfig"]["properties"]["objective"]
    assert section["enum"] == [*OBJECTIVES]
    assert section["enum"][-1] == NAME
    searched = apply_overrides(config, {"search": SEARCH}).search
    assert searched is not None
    assert searched.modes == ["max"]
    assert (label("entropy"), direction("entropy")) == ("entropy in nats", "max")
    with pytest.raises(ConfigError, match=r"eval_entropy is not a figure of train\.objective=sft"):
        apply_overrides(config, {"search": SEARCH, "train.objective": "sft"})
    with pytest.raises(ConfigError, match=rf"label_smoothing=0\.1 .*train\.objective={NAME}"):
        apply_overrides(config, {"train.label_smoothing": 0.1})
    del OBJECTIVES[NAME]
    with pytest.raises(ConfigError, match=rf"objective={NAME} is not sft, clm, .* or reward"):
        apply_overrides(config, {"train.lr": 0.1})
    OBJECTIVES[NAME] = ENTRY


def test_it_trains_and_promotes_by_a_figure_of_its_own(config: Config, tmp_path: Path) -> None:
    config = apply_overrides(config, {"promote.metric": "entropy"})
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "config.yaml").write_text(dump_yaml(config))
    data = prepare_data(config.data, load_tokenizer(config.model), config.seed, tmp_path / "cache")
    spec = RunSpec(config, run_dir, data.path, metric="eval_entropy", mode="max")
    result = run_training(spec, "single", Silent())
    assert result.status == "completed"
    assert result.best is not None
    evaluations = [line for line in metrics(run_dir) if "eval_loss" in line]
    assert [line.keys() >= {"eval_loss", "eval_entropy"} for line in evaluations] == [True] * 4
    found = [line["eval_entropy"] for line in evaluations]
    assert result.best.figures["eval_entropy"] == max(found[1:])
    promotion = promote(run_dir, cache_dir=tmp_path / "cache", samples=0)
    content = json.loads((run_dir / "promoted" / "evaluation.json").read_text())
    assert (content["metric"], content["mode"]) == ("entropy", "max")
    assert content["promoted"].keys() == {"eval_loss", "entropy"}
    assert content["base"]["entropy"] == pytest.approx(found[0], rel=1e-5)
    tuned = next(row for row in content["candidates"] if row["name"] != "base")
    assert tuned["figures"]["entropy"] == pytest.approx(max(found[1:]), rel=1e-5)
    assert promotion.evaluation.differences["entropy"]["interval"] is None  # 8 examples
    rows = (run_dir / "promoted" / "scores.jsonl").read_text().splitlines()
    assert all("entropy" in json.loads(row) for row in rows)
