"""DeepSpeed ZeRO against one process, and a run that changes between it and every other layout.

Processes take seconds to start, so each group of them does many runs.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from raytune_ft.model.load import build_model
from raytune_ft.strategy.deepspeed import DeepSpeed
from raytune_ft.train.checkpoint import load_state
from raytune_ft.train.optim import build_optimizer
from tests.support.distributed import run_in_new_processes
from tests.support.models import save_tiny_llama
from tests.support.objectives import config_of as objective_config
from tests.support.objectives import save_inputs
from tests.support.runs import (
    BrokenRun,
    Recorder,
    final_weights,
    largest_difference,
    losses,
    make_config,
    run,
)

pytestmark = pytest.mark.distributed

Inputs = tuple[Path, Path]
METHODS = {"lora": {}, "full": {"method": {"name": "full"}}, "dora": {"method.dora": True}}
ALONE = {"data.packing": False, "train.micro_tokens": 1}
PACKED = {"data.packing": True, "train.micro_tokens": 96}
SHORT = {"train.max_examples": 7 * 20 - 3, "checkpoint.asynchronous": False}  # 20 steps
BOUND = 1e-5
BROKEN_AT = 11


@dataclass(frozen=True)
class Layout:
    """Where a run is, or goes on."""

    strategy: str
    workers: int = 1
    stage: int = 3
    offload: str = "none"
    json: str | None = None

    @property
    def name(self) -> str:
        """For directories and messages."""
        if self.strategy != "deepspeed":
            return f"{self.strategy}-{self.workers}"
        return f"zero{self.stage}-{self.workers}-{self.offload}"

    @property
    def changes(self) -> dict[str, Any]:
        """The config of it."""
        if self.strategy != "deepspeed":
            return PACKED
        return PACKED | {
            "parallel.strategy": "deepspeed",
            "parallel.zero_stage": self.stage,
            "parallel.offload": self.offload,
            "parallel.deepspeed": self.json,
        }


@dataclass(frozen=True)
class Job:
    """A run in `run_dir`, from its start or from where it broke."""

    run_dir: Path
    layout: Layout
    changes: dict[str, Any]
    broken: bool = False


def _do(inputs: Inputs, jobs: Sequence[Job]) -> None:
    """All jobs, which have one number of workers, one after another; called on every rank."""
    for job in jobs:
        config = make_config(*inputs, job.changes | job.layout.changes)
        if job.broken:
            with pytest.raises(BrokenRun):
                run(config, job.run_dir, job.layout.strategy, Recorder(fail_at=BROKEN_AT))
        else:
            resumes = (job.run_dir / "checkpoints").exists()
            result = run(config, job.run_dir, job.layout.strategy, resumes=resumes)
            assert result.status == "completed", job


def _do_all(inputs: Inputs, jobs: Sequence[Job]) -> None:
    """One group of processes for each number of workers."""
    for workers in sorted({job.layout.workers for job in jobs}):
        some = [job for job in jobs if job.layout.workers == workers]
        if all(job.layout.strategy == "single" for job in some):
            _do(inputs, some)
        else:
            run_in_new_processes(_do, workers, inputs, some)


class References:
    """Runs in one process, one example after another; each is made once."""

    def __init__(self, inputs: Inputs, root: Path) -> None:
        self._inputs, self._root = inputs, root

    def of(self, changes: dict[str, Any]) -> Path:
        """The run of such a config."""
        run_dir = self._root / str(abs(hash(json.dumps(changes))))
        if not run_dir.exists():
            assert run(make_config(*self._inputs, changes | ALONE), run_dir).status == "completed"
        return run_dir


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory, inputs: Inputs) -> References:
    return References(inputs, tmp_path_factory.mktemp("references"))


def _check_layouts(
    root: Path,
    inputs: Inputs,
    references: References,
    layouts: Sequence[Layout],
    methods: Sequence[str],
    changes: dict[str, Any],
) -> None:
    cases = [(layout, method) for layout in layouts for method in methods]
    _check_cases(root, inputs, references, cases, changes)


def _check_cases(
    root: Path,
    inputs: Inputs,
    references: References,
    cases: Sequence[tuple[Layout, str]],
    changes: dict[str, Any],
) -> None:
    jobs = [
        Job(root / f"{layout.name}-{method}", layout, changes | METHODS[method])
        for layout, method in cases
    ]
    _do_all(inputs, jobs)
    measured = {
        job.run_dir.name: largest_difference(job.run_dir, references.of(job.changes))
        for job in jobs
    }
    print(measured)
    assert all(max(found) < BOUND for found in measured.values()), measured


def test_every_stage(tmp_path: Path, inputs: Inputs, references: References) -> None:
    cases = [(1, "lora"), (2, "full"), (3, "lora"), (3, "full")]
    stages = [(Layout("deepspeed", 2, stage), method) for stage, method in cases]
    ten_steps = SHORT | {"train.max_examples": 7 * 10 - 3}
    _check_cases(tmp_path, inputs, references, stages, ten_steps)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_stage_for_40_steps(tmp_path: Path, inputs: Inputs, references: References) -> None:
    layouts = [
        *(Layout("deepspeed", 2, stage) for stage in (1, 2, 3)),
        *(Layout("deepspeed", 2, stage, "optimizer") for stage in (1, 2, 3)),
        *(Layout("deepspeed", workers, 3, "all") for workers in (1, 2)),
        *(Layout("deepspeed", 3, stage) for stage in (1, 2, 3)),
    ]
    _check_layouts(tmp_path, inputs, references, layouts, ["lora", "full", "dora"], {})


@pytest.mark.slow
def test_with_a_json(tmp_path: Path, inputs: Inputs, references: References) -> None:
    file = Path(__file__).parents[2] / "jobs" / "deepspeed_zero3.json"
    layouts = [Layout("deepspeed", 2, 3, "all", str(file))]
    _check_layouts(tmp_path, inputs, references, layouts, ["lora", "full"], SHORT)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_tied_embeddings_and_no_clipping(
    tmp_path: Path, inputs: Inputs, references: References
) -> None:
    tied = save_tiny_llama(tmp_path / "tied", tied=True)
    layouts = [Layout("deepspeed", 2, stage) for stage in (1, 2, 3)]
    # At 3e-3 this model's weights move by 1.4e-5 in one process, only for being packed.
    changes = SHORT | {"model.path": str(tied), "train.max_grad_norm": None, "train.lr": 1e-3}
    _check_layouts(tmp_path, inputs, references, layouts, ["lora", "full"], changes)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_bfloat16_moves_no_more_than_by_another_layout(tmp_path: Path, inputs: Inputs) -> None:
    layouts = [Layout("deepspeed", 2, stage) for stage in (1, 2, 3)]
    layouts.append(Layout("deepspeed", 2, 3, "all"))
    others = [
        {"data.packing": True, "train.micro_tokens": 200},
        {"data.packing": False, "train.micro_tokens": 100},
        {"data.packing": "auto"},
    ]
    methods = {name: METHODS[name] | {"train.precision": "bfloat16"} for name in ("lora", "full")}
    jobs = [
        Job(tmp_path / f"{layout.name}-{name}", layout, changes)
        for layout in layouts
        for name, changes in methods.items()
    ]
    _do_all(inputs, jobs)
    for name, changes in methods.items():
        reference = tmp_path / name
        run(make_config(*inputs, changes | ALONE), reference)
        spread = 0.0
        for number, other in enumerate(others):
            run(make_config(*inputs, changes | other), tmp_path / f"{name}-{number}")
            moved = largest_difference(tmp_path / f"{name}-{number}", reference)
            spread = max(spread, *moved[:2])
        found = {
            layout.name: largest_difference(tmp_path / f"{layout.name}-{name}", reference)
            for layout in layouts
        }
        print(name, spread, found)
        assert all(max(each[:2]) < 2 * spread for each in found.values()), (spread, found)


def _check_resumes(
    root: Path,
    inputs: Inputs,
    references: References,
    ways: Sequence[tuple[Layout, Layout, str]],
) -> None:
    """Break under the first layout of each way, go on under the second."""
    broken = {
        (first, method): Job(
            root / "broken" / f"{first.name}-{method}", first, SHORT | METHODS[method], broken=True
        )
        for first, _, method in ways
    }
    _do_all(inputs, list(broken.values()))
    resumed = []
    for first, second, method in ways:
        job = broken[first, method]
        assert len(losses(job.run_dir)) == BROKEN_AT
        goes_on = root / f"{first.name}-then-{second.name}-{method}"
        shutil.copytree(job.run_dir, goes_on)
        resumed.append(Job(goes_on, second, job.changes))
    _do_all(inputs, resumed)
    measured = {
        job.run_dir.name: largest_difference(job.run_dir, references.of(job.changes))
        for job in resumed
    }
    print(measured)
    assert all(max(found) < BOUND for found in measured.values()), measured


@pytest.mark.slow
def test_resume_to_and_from_one_process(
    tmp_path: Path, inputs: Inputs, references: References
) -> None:
    single, stage_2, stage_3 = Layout("single"), Layout("deepspeed", 2, 2), Layout("deepspeed", 2)
    ways = [
        (stage_3, single, "lora"),
        (single, stage_3, "lora"),
        (stage_2, stage_3, "full"),
        (stage_3, stage_2, "full"),
    ]
    _check_resumes(tmp_path, inputs, references, ways)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_resume_under_any_layout(tmp_path: Path, inputs: Inputs, references: References) -> None:
    zero = {(stage, n): Layout("deepspeed", n, stage) for stage in (1, 2, 3) for n in (1, 2, 3)}
    single, ddp, fsdp = Layout("single"), Layout("ddp", 2), Layout("fsdp", 2)
    host = Layout("deepspeed", 2, 3, "all")
    ways = [
        (zero[1, 2], zero[1, 3]),
        (zero[1, 3], zero[1, 1]),
        (zero[2, 3], zero[2, 2]),
        (zero[2, 1], zero[1, 2]),
        (zero[3, 2], zero[3, 3]),
        (zero[3, 3], zero[3, 1]),
        (zero[3, 1], zero[3, 2]),
        (zero[3, 3], single),
        (single, zero[3, 3]),
        (zero[1, 2], fsdp),
        (fsdp, zero[2, 2]),
        (fsdp, zero[3, 2]),
        (zero[3, 2], fsdp),
        (ddp, zero[3, 3]),
        (zero[3, 2], ddp),
        (ddp, host),
        (host, zero[2, 2]),
        (zero[3, 2], Layout("deepspeed", 2, 2, "optimizer")),
    ]
    both = [(first, second, method) for first, second in ways for method in ("lora", "full")]
    _check_resumes(tmp_path, inputs, references, both)


@pytest.mark.slow
def test_what_is_not_trained(tmp_path: Path, inputs: Inputs) -> None:
    _do(inputs, [Job(tmp_path / "run", Layout("single"), SHORT, broken=True)])
    run_in_new_processes(_not_trained, 2, inputs, tmp_path / "run")


def _not_trained(inputs: Inputs, run_dir: Path) -> None:
    for stage in (2, 3):
        _check_idle(inputs, stage)
    _check_frozen(inputs, run_dir)


def _check_idle(inputs: Inputs, stage: int) -> None:
    """What gets no gradient does not move, nor does anything where the gradient is not finite."""
    changes = METHODS["full"] | {"train.weight_decay": 0.5}
    config = make_config(*inputs, changes | Layout("deepspeed", 2, stage).changes)
    model = build_model(config.model, config.method, config.train.precision, config.seed)
    model.idle = torch.nn.Parameter(torch.arange(15.0).view(5, 3) + 1)
    strategy = DeepSpeed(config.parallel, config.train.precision)
    wrapped = strategy.prepare(model, lambda found: build_optimizer(found, config.train))
    names = list(strategy.parameters)
    start = {name: strategy.parts(name)[""].values.clone() for name in names}
    assert strategy.parts("idle")[""].shape == (5, 3)
    for factor, finite in ((1.0, True), (float("inf"), False)):
        before = {name: strategy.parts(name)[""].values.clone() for name in names}
        with strategy.accumulate(last=True):
            loss = wrapped(input_ids=torch.arange(1, 9).view(1, -1)).logits.square().mean()
            strategy.backward(loss * factor)
        assert math.isfinite(strategy.step(1e-2, 1.0)) is finite
        for name in names:
            part = strategy.parts(name)
            moved = not torch.equal(part[""].values, before[name])
            assert moved is (finite and name != "idle" and part[""].values.numel() > 0), name
    for name, part in strategy.parts("idle").items():
        assert torch.equal(part.values, torch.zeros_like(start["idle"]) if name else start["idle"])


def _check_frozen(inputs: Inputs, run_dir: Path) -> None:
    """Stage 3 shards the base of LoRA too, of which a checkpoint holds nothing."""
    config = make_config(*inputs, SHORT | Layout("deepspeed").changes)
    checkpoint = sorted((run_dir / "checkpoints").glob("step-*"))[-1]
    model = build_model(config.model, config.method, config.train.precision, config.seed)
    base = {name: p.detach().clone() for name, p in model.named_parameters()}
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    assert 0 < len(names) < len(base)
    strategy = DeepSpeed(config.parallel, config.train.precision)
    wrapped = strategy.prepare(model, lambda found: build_optimizer(found, config.train))
    tokens = torch.arange(1, 9).view(1, -1)
    with torch.no_grad():
        before = wrapped(input_ids=tokens).logits  # leaves weights gathered
        load_state(checkpoint, strategy, names, strategy.side_channel())
        after = wrapped(input_ids=tokens).logits
    assert (before - after).abs().max() > 1e-4
    saved = final_weights(run_dir)
    import deepspeed  # only now, since the strategy says on which device

    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        for name, parameter in model.named_parameters():
            expected = saved[name] if name in names else base[name]
            assert torch.equal(parameter, expected), name


ROLLOUTS = ("grpo", "online_dpo", "ppo")
OFFLINE = ("dpo", "orpo", "kto", "reward", "simpo")


def _objectives(inputs: Path, root: Path, strategy: str, changes: dict[str, Any]) -> None:
    for name in ROLLOUTS + OFFLINE:
        common = {"checkpoint.asynchronous": False, "train.adam_epsilon": 1e-5}
        result = run(objective_config(inputs, name, common | changes), root / name, strategy)
        assert result.status == "completed"


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_preferences_and_rollouts(tmp_path: Path, stage: int) -> None:
    """As one process; two ranks say the same, gathering weights in each pass of the sampling."""
    inputs = save_inputs(tmp_path / "inputs")
    _objectives(inputs, tmp_path / "single", "single", ALONE)
    layout = Layout("deepspeed", 2, stage)
    run_in_new_processes(_objectives, 2, inputs, tmp_path / "zero", "deepspeed", layout.changes)
    for name in ROLLOUTS + OFFLINE:
        one, other = tmp_path / "single" / name, tmp_path / "zero" / name
        assert max(largest_difference(one, other)) < BOUND, name
        if name in ROLLOUTS:
            assert _said(one) == _said(other)


def _said(run_dir: Path) -> list[str]:
    lines = (run_dir / "rollouts.jsonl").read_text().splitlines()
    return [json.loads(line)["completion"] for line in lines]
