"""Methods and strategies of another package: one file and one dict entry each, nothing else."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from peft import HRAConfig
from pydantic import Field
from torch import Tensor, nn

from raytune_ft.config.load import load_config, memory_decides
from raytune_ft.config.methods import METHODS, Method, MethodConfig
from raytune_ft.config.reference import keys
from raytune_ft.config.schema import Config, ParallelConfig
from raytune_ft.config.strategies import STRATEGIES, StrategyFacts
from raytune_ft.errors import ConfigError
from raytune_ft.model.methods.base import Implementation
from raytune_ft.model.methods.hooks import Attached, Read, chosen_blocks, first_of, with_first
from raytune_ft.model.methods.peft import adapt, task_of
from raytune_ft.plan.make import make_plan
from raytune_ft.plan.text import describe
from raytune_ft.promote.promote import promote
from raytune_ft.strategy.base import Held, Message, Shape, Traffic
from raytune_ft.strategy.single import Single
from tests.support.runs import BrokenRun, Recorder, losses, make_config, make_inputs, run
from tests.support.trained import train_as, write_rows


class ReflectMethod(MethodConfig):
    """Householder reflections of each layer's input (arXiv 2405.17484), which PEFT has."""

    name: Literal["reflect"]
    rank: int = Field(2, gt=0, description="reflections of a layer")

    def check(self) -> None:
        if self.rank % 2:
            raise ConfigError(f"method.rank={self.rank}", "is odd", "write an even number")


def _reflect(base: nn.Module, method: ReflectMethod) -> nn.Module:
    config = HRAConfig(r=method.rank, target_modules="all-linear", **task_of(base))
    return adapt(base, config, "all-linear")


class ShiftMethod(MethodConfig):
    """A learned vector that is added to the output of every block."""

    name: Literal["shift"]
    scale: float = Field(1.0, description="of the vector")


class Shift(Attached):
    """The vectors of one model."""

    def __init__(self, model: nn.Module, scale: float) -> None:
        super().__init__(model)
        self._model, self._scale = model, scale
        self._blocks = [name for name, _ in chosen_blocks(model, "all").values()]
        width = model.get_input_embeddings().embedding_dim  # type: ignore[operator]
        for name in self._blocks:
            block = model.get_submodule(name)
            block.register_parameter("shift", nn.Parameter(torch.zeros(width)))
            block.register_forward_hook(self._add)

    def _add(self, block: nn.Module, arguments: Any, output: Any) -> Any:
        if not self.enabled:
            return output
        states = first_of(output)
        return with_first(output, states + self._scale * block.get_parameter("shift").to(states))

    def contents(self, read: Read) -> tuple[dict[str, Any], dict[str, Tensor]]:
        tensors = {name: read(f"{name}.shift") for name in self._blocks}
        return {"method": "shift", "scale": self._scale}, tensors

    @torch.no_grad()
    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        for name in self._blocks:
            self._model.get_parameter(f"{name}.shift").copy_(tensors[name])


def _shift(base: nn.Module, scale: float) -> nn.Module:
    base.requires_grad_(False)
    Shift(base, scale)
    return base


class Logged(Single):
    """One process with a log of its learning rates, which takes a few bytes."""

    rates: list[float] = []  # noqa: RUF012 - of all runs of the test

    def step(self, lr: float, max_norm: float | None) -> float:
        self.rates.append(lr)
        return super().step(lr, max_norm)

    @staticmethod
    def memory(shape: Shape, parallel: ParallelConfig) -> Held:
        return replace(Single.memory(shape, parallel), buffers=4096)

    @staticmethod
    def traffic(shape: Shape, parallel: ParallelConfig, micro_batches: int) -> Traffic:
        return Traffic((Message("all-reduce", 4096, 1),))


pytestmark = pytest.mark.usefixtures("traced_once")
ENTRIES = {
    "reflect": Method(
        ReflectMethod,
        lambda: Implementation(_reflect),
        "adapter",
        saved_as="HRA",
        own_weights="hra_",
    ),
    "shift": Method(
        ShiftMethod,
        lambda: Implementation(
            lambda base, method: _shift(base, method.scale),
            restore=lambda base, written: _shift(base, written["scale"]) and None,
        ),
        "activations",
        saved_as="shift",
    ),
}
LOGGED = StrategyFacts(lambda: Logged, one_process=True)
SHORT = {"train.max_examples": 70, "train.eval_every_examples": 35, "train.lr": 1e-2}


@pytest.fixture(autouse=True)
def _added(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, method in ENTRIES.items():
        monkeypatch.setitem(METHODS, name, method)
    monkeypatch.setitem(STRATEGIES, "logged", LOGGED)
    monkeypatch.setattr(Logged, "rates", [])


def write_config(folder: Path, **sections: Any) -> Path:
    """A config file for the tiny Llama and rows of "say a letter twice"."""
    model, _ = make_inputs(folder)
    for name, count in (("train", 160), ("test", 20)):
        write_rows(folder / f"{name}.jsonl", count, seed=count)
    content = {
        "name": "some",
        "storage": str(folder),
        "model": {"path": str(model)},
        "data": {
            "train": {"path": str(folder / "train.jsonl")},
            "validation": 0.1,
            "test": {"path": str(folder / "test.jsonl")},
        },
        "train": {"batch_size": 8, "lr": 1e-2, "epochs": 2, "precision": "float32"},
        "promote": {"max_overlap": 1.0},
        **sections,
    }
    file = folder / "config.yaml"
    file.write_text(json.dumps(content))
    return file


def _resumed_as_unbroken(config: Config, folder: Path, strategy: str = "single") -> None:
    run(config, folder / "whole", strategy)
    assert losses(folder / "whole")[-1] < losses(folder / "whole")[0]
    with pytest.raises(BrokenRun):
        run(config, folder / "broken", strategy, reporter=Recorder(fail_at=8))
    run(config, folder / "broken", strategy, resumes=True)
    assert losses(folder / "broken") == losses(folder / "whole")


@pytest.mark.parametrize("name", ENTRIES)
def test_a_method_is_validated_and_described(name: str, tmp_path: Path) -> None:
    file = write_config(tmp_path)
    config = load_config(file, [f"method.name={name}", "parallel.workers=2"])
    assert type(config.method) is ENTRIES[name].config
    assert memory_decides(config)  # its base is frozen
    with pytest.raises(ConfigError, match=rf"method.name={name}x is not .*; did you mean {name}"):
        load_config(file, [f"method.name={name}x"])
    with pytest.raises(ConfigError, match=rf"method.ranks is not a key of method {name}"):
        load_config(file, [f"method.name={name}", "method.ranks=1"])
    assert {key.dotted for key in keys()} > {"method.scale", "method.rank"}
    schema = Config.model_json_schema()
    assert ENTRIES[name].config.__name__ in schema["$defs"]


def test_keys_of_a_method_are_checked_by_itself(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"method.rank=3 is odd; write an even number"):
        load_config(write_config(tmp_path), ["method.name=reflect", "method.rank=3"])


@pytest.mark.parametrize("name", ENTRIES)
def test_a_method_trains_and_resumes(name: str, tmp_path: Path) -> None:
    changes = {"method": {"name": name}, "checkpoint.every_examples": 35, **SHORT}
    changes["checkpoint.asynchronous"] = False
    _resumed_as_unbroken(make_config(*make_inputs(tmp_path), changes), tmp_path)


@pytest.mark.parametrize("name", ENTRIES)
def test_a_method_is_planned_and_promoted(name: str, tmp_path: Path) -> None:
    file = write_config(tmp_path, method={"name": name})
    assert f"    name: {name}" in describe(make_plan(file, [], lambda line: None))
    run_dir, told = train_as(file, "trained"), list[str]()
    promotion = promote(run_dir, tell=told.append)
    figures = json.loads((run_dir / "promoted" / "evaluation.json").read_text())
    assert figures["promoted"]["eval_loss"] < figures["base"]["eval_loss"]
    if name == "reflect":
        assert (promotion.model / "config.json").is_file()  # folded, and checked by the fold
    else:
        assert promotion.model == run_dir / "promoted" / "adapter"
        assert "shift cannot be folded: adapter holds it, to be used with its base" in told


def test_a_strategy_is_validated_and_planned(tmp_path: Path) -> None:
    file = write_config(tmp_path)
    plan = make_plan(file, ["parallel.strategy=logged"], lambda line: None)
    assert {"single", "logged"} <= {option.name for option in plan.options}
    assert plan.own.memory.buffers == 4096
    assert "strategy: logged (written in the config)" in describe(plan)
    with pytest.raises(ConfigError, match=r"strategy=logged runs in one process, and .*workers=2"):
        load_config(file, ["parallel.strategy=logged", "parallel.workers=2"])
    with pytest.raises(ConfigError, match=r"parallel.strategy=loged .*; did you mean logged"):
        load_config(file, ["parallel.strategy=loged"])


def test_a_strategy_trains_and_resumes(tmp_path: Path) -> None:
    changes = {"checkpoint.every_examples": 35, "checkpoint.asynchronous": False, **SHORT}
    config = make_config(*make_inputs(tmp_path), changes)
    _resumed_as_unbroken(config, tmp_path, "logged")
    assert len(Logged.rates) > 10
    run(config, tmp_path / "single")
    assert losses(tmp_path / "single") == losses(tmp_path / "whole")


def test_rules_ask_the_facts_of_a_strategy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = StrategyFacts(lambda: Logged, shards=True, offload=("optimizer",), float64=False)
    monkeypatch.setitem(STRATEGIES, "parted", facts)
    file, parted = write_config(tmp_path), "parallel.strategy=parted"
    with pytest.raises(ConfigError, match="precision=float64 is not supported by parted"):
        load_config(file, [parted, "train.precision=float64"])
    with pytest.raises(ConfigError, match="4 bits, which parted does not shard"):
        load_config(file, [parted, "method.name=qlora"])
    with pytest.raises(ConfigError, match=r"write parallel.strategy: deepspeed or parted, or"):
        load_config(file, ["parallel.strategy=ddp", "parallel.offload=optimizer"])
    assert load_config(file, [parted, "parallel.offload=optimizer"]).parallel.strategy == "parted"
