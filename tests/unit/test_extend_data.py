"""A format, a merge and a scheduler of one's own, added to the public dicts alone.

docs/extending.md shows the same code.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pytest
import torch
from pydantic import Field
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from safetensors.torch import load_file
from torch import Tensor

from raytune_ft.config import objectives
from raytune_ft.config.data import FORMATS, Format, SourceConfig
from raytune_ft.config.load import dump_yaml, load_config
from raytune_ft.config.merging import MERGES, Merge
from raytune_ft.config.reference import keys
from raytune_ft.config.schema import ModelConfig
from raytune_ft.config.search import SCHEDULERS, Scheduler, SchedulerConfig
from raytune_ft.data.formats import Encoder, Example, RowReader
from raytune_ft.data.formats.example import bad_text, example_of
from raytune_ft.data.report import DataReport
from raytune_ft.data.rows import BadRow, Row
from raytune_ft.errors import ConfigError
from raytune_ft.merge.merge import merge
from raytune_ft.merge.methods import Formula, MergeSettings, Position
from raytune_ft.plan.make import make_plan
from raytune_ft.plan.text import describe
from raytune_ft.promote.promote import promote
from raytune_ft.ray_backend.schedulers import scheduler_for
from tests.support.trained import Train, _one_thread, inputs, train

__all__ = ["_one_thread", "inputs", "train"]


# A format: `question => answer` in the column of the text.


def check_arrow(source: SourceConfig, row: Row) -> BadRow | None:
    bad = bad_text(row, source.text)
    if bad is None and "=>" not in row.values[source.text]:
        bad = BadRow(row.origin, "no_arrow", f"{source.text!r} has no =>")
    return bad


def encode_arrow(
    encoder: Encoder, source: SourceConfig, separator: str, rows: Sequence[Row]
) -> list[Example | BadRow]:
    halves = [row.values[source.text].split("=>", 1) for row in rows]
    questions = encoder.encode([question + separator for question, _ in halves])
    answers = encoder.encode([answer for _, answer in halves])
    return [
        example_of(row, [*encoder.prefix, *question], [*answer, *encoder.suffix])
        for row, question, answer in zip(rows, questions, answers, strict=True)
    ]


ARROW = RowReader(
    columns=lambda source: {"text": source.text},
    check=check_arrow,
    prompt=lambda source, row: str(row.values[source.text]).split("=>")[0],
    encode=encode_arrow,
)


def test_a_format_is_planned_prepared_and_trained_on(
    train: Train, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"text": f"say {letter}=>{letter * 2}"} for letter in "abcdefgh" * 20]
    for name, kept in (("train", rows), ("test", [*rows[:8], {"text": "nothing to say"}])):
        lines = "".join(json.dumps(row) + "\n" for row in kept)
        (tmp_path / f"{name}.jsonl").write_text(lines)
    wanted = [
        f"data.train={{path: {tmp_path}/train.jsonl, format: arrow}}",
        f"data.test={{path: {tmp_path}/test.jsonl, format: arrow}}",
        "data.max_bad_fraction=0.5",
    ]
    file = inputs / "config.yaml"  # which the fixture `train` wrote
    with pytest.raises(ConfigError, match=r"data\.train\.format=arrow is not prompt_completion, "):
        load_config(file, wanted)
    with monkeypatch.context() as patch:
        patch.setitem(FORMATS, "arrow", Format(lambda: ARROW))
        sft = objectives.OBJECTIVES["sft"]
        patch.setitem(objectives.OBJECTIVES, "sft", replace(sft, formats=(*sft.formats, "arrow")))
        plan = describe(make_plan(file, [*wanted, "name=arrow"], lambda line: None))
        assert "[[aa</s>]]" in plan
        run = train("arrow", *wanted)
        with pytest.raises(ConfigError, match=r"is for format: messages, .*and this is arrow"):
            load_config(file, [*wanted, "data.train.train_on=[user]"])
    report = DataReport.from_json((run / "data.json").read_text())
    assert report.sources["test"].bad == {"no_arrow": 1}
    assert report.overlaps["train/test"] == 8
    losses = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    evaluations = [line["eval_loss"] for line in losses if "eval_loss" in line]
    assert evaluations[-1] < 0.5 * evaluations[0]
    with pytest.raises(ConfigError, match=r"format=arrow is not"):
        load_config(file, wanted)


# A merge: the mean of the deltas, where all of them have one sign.


def consensus(
    tensors: Sequence[Tensor], base: Tensor, settings: MergeSettings, facts: Any, at: Position
) -> Tensor:
    deltas = torch.stack([tensor - base for tensor in tensors])
    agrees = deltas.sign().sum(0).abs() == len(tensors)
    return base + deltas.mean(0) * agrees


CONSENSUS = Formula("consensus", consensus, least=2)


def test_a_merge_competes_in_a_promotion(
    train: Train, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep, records = tmp_path / "sweep", []
    for name, lr in (("t0", "8e-3"), ("t1", "1e-2")):
        run = train(f"consensus-{name}", f"train.lr={lr}", f"seed={name[1]}")
        shutil.copytree(run, sweep / "trials" / name)
        loss = json.loads((run / "result.json").read_text())["best"]["eval_loss"]
        records.append({"id": name, "params": {}, "status": "completed", "eval_loss": loss})
    (sweep / "result.json").write_text(json.dumps({"status": "completed", "trials": records}))
    text = (sweep / "trials/t0/config.yaml").read_text()
    (sweep / "config.yaml").write_text(text.replace("merge: best", "merge: consensus"))
    with pytest.raises(ConfigError, match=r"promote\.merge=consensus is not best, uniform_soup, "):
        promote(sweep)
    monkeypatch.setitem(MERGES, "consensus", Merge(lambda: CONSENSUS))
    promote(sweep)
    evaluation = json.loads((sweep / "promoted/evaluation.json").read_text())
    base, _, mine = evaluation["candidates"]
    assert (mine["name"], sorted(mine["settings"]["trials"])) == ("consensus", ["t0", "t1"])
    assert mine["figures"]["eval_loss"] < base["figures"]["eval_loss"]

    model = ModelConfig(path=str(inputs / "base"))
    best = [json.loads((sweep / f"trials/{name}/result.json").read_text()) for name in ("t0", "t1")]
    members = [
        sweep / "trials" / name / found["best"]["checkpoint"]
        for name, found in zip(("t0", "t1"), best, strict=True)
    ]
    examples = [torch.tensor([1, 2, 3])]
    for number, member in enumerate(members):
        merge(model, [member], tmp_path / str(number), "best", examples)
    merge(model, members, tmp_path / "merged", "consensus", examples)
    one, two, merged = (
        load_file(tmp_path / name / "model.safetensors") for name in ("0", "1", "merged")
    )
    origin = load_file(inputs / "base" / "model.safetensors")
    differs = 0
    for name, weight in merged.items():
        expected = consensus(
            [one[name], two[name]], origin[name], MergeSettings(), None, Position(name)
        )
        torch.testing.assert_close(weight, expected, rtol=0, atol=1e-5)
        differs += int((weight != origin[name]).sum())
    assert differs


# A scheduler: trials above a loss are stopped at each evaluation from the first rung on.


class CeilingConfig(SchedulerConfig):
    name: Literal["ceiling"]
    limit: float = Field(2.0, description="trials above this are stopped")


class Ceiling(FIFOScheduler):
    def __init__(self, config: CeilingConfig, metric: str, mode: str) -> None:
        super().__init__()
        self.config, self.judged_by, self.sign = config, metric, 1 if mode == "min" else -1

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        is_late = result["examples"] >= self.config.grace_examples
        over = self.sign * (result[self.judged_by] - self.config.limit) > 0
        return TrialScheduler.STOP if is_late and over else TrialScheduler.CONTINUE


CEILING = Scheduler(
    CeilingConfig,
    implementation=lambda: lambda config, budget, metric, mode: Ceiling(config, metric, mode),
    rungs=lambda config, examples: [config.grace_examples],
    cost_share=lambda config, budget: config.grace_examples / budget,
)
SEARCHED = """
name: a
data: {train: {path: /x.jsonl}}
search:
  space: {train.lr: {log_uniform: [1e-5, 1e-3]}}
  scheduler: {name: ceiling, grace_examples: 100, limit: 1.5}
"""


def test_a_scheduler_stops_trials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(SEARCHED)
    with pytest.raises(ConfigError, match=r"scheduler\.name=ceiling is not asha, hyperband or med"):
        load_config(file)
    monkeypatch.setitem(SCHEDULERS, "ceiling", CEILING)
    search = load_config(file).search
    assert search is not None
    config = search.scheduler
    assert config == CeilingConfig(name="ceiling", grace_examples=100, limit=1.5)
    saved = tmp_path / "saved.yaml"
    saved.write_text(dump_yaml(load_config(file)))
    assert load_config(saved) == load_config(file)
    with pytest.raises(ConfigError, match=r"limt is not a key of scheduler ceiling; did you mean"):
        load_config(file, ["search.scheduler.limt=1"])
    assert "search.scheduler.limit" in [key.dotted for key in keys()]
    assert search.cost_share(1000) == 0.1

    rule = scheduler_for(config, 900, "eval_loss", "min")
    rule.recall("a", {100: 1.0, 200: 1.2})
    said = {}
    for name, values in {"a": {200: 9.0, 300: 1.0}, "b": {50: 9.0, 100: 1.6}}.items():
        trial = SimpleNamespace(config={"trial": name, "budget": 900})
        rule.on_trial_add(None, trial)
        for examples, loss in values.items():
            report = {"examples": examples, "eval_loss": loss}
            said[name, examples] = rule.on_trial_result(None, trial, report)
    assert [key for key, answer in said.items() if answer == TrialScheduler.STOP] == [("b", 100)]
