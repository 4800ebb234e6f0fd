"""Models measured by worker groups: the figures of one process, errors as they are."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import pytest

from raytune_ft.config.rewards import Length
from raytune_ft.config.sampling import SamplingConfig
from raytune_ft.config.schema import Config, PromoteConfig
from raytune_ft.data.formats.prompt import Prompt
from raytune_ft.data.prepare import prepare_data
from raytune_ft.errors import ClusterError, DataError, ModelError
from raytune_ft.evaluate.answers import Asking
from raytune_ft.evaluate.evaluate import Job, Measured, run_job
from raytune_ft.evaluate.workers import HERE
from raytune_ft.model.load import load_tokenizer
from raytune_ft.ray_backend.call import WorkerGroups
from raytune_ft.records import Tell
from raytune_ft.rewards.pool import SharedRewards
from raytune_ft.strategy import Strategy
from tests.ray.conftest import Inputs, assert_nothing_left
from tests.support.models import save_tiny_llama
from tests.unit.data.test_parts import content

pytestmark = pytest.mark.ray
SETTINGS = PromoteConfig(metrics=["loss", "rouge", "reward"], max_new_tokens=4)


def jobs(inputs: Inputs, directory: Path, settings: PromoteConfig, count: int = 3) -> list[Job]:
    """Three models, more than the cluster has room for at a time; a reward scores what they say."""
    config = inputs.config()
    asked = [Prompt(f"r:{place}", (place + 2, 5, 7), (), {}, None, "a") for place in range(12)]
    rewards = SharedRewards([Length(name="length", target=4)])
    sampling = SamplingConfig(n=2, max_new_tokens=6)
    asking = Asking(tuple(asked), "data.validation", sampling, 3, rewards)
    made = []
    for seed in range(count):
        path = save_tiny_llama(directory / str(seed), seed)
        model = config.model.model_copy(update={"path": str(path)})
        job = Job(model, config.model, settings, inputs.data_dir, "validation", asking=asking)
        made.append(job)
    return made


def groups(config: Config, folder: Path, tell: Tell = lambda line: None) -> WorkerGroups:
    return WorkerGroups(config, folder, tell)


def assert_same(found: list[Measured], wanted: list[Job]) -> None:
    for one, alone in zip(found, HERE.each(run_job, wanted), strict=True):
        assert one.figures == pytest.approx(alone.figures, rel=1e-6)
        assert one.continuations == alone.continuations
        assert one.answers is not None
        assert alone.answers is not None
        assert one.answers.groups == alone.answers.groups


def test_data_are_tokenised_in_tasks(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("raytune_ft.ray_backend.tokenise.WORTH_BYTES", 0)
    config, said = inputs.config(), list[str]()
    tokenizer = load_tokenizer(config.model)
    alone = prepare_data(config.data, tokenizer, 0, tmp_path / "alone")
    workers = groups(config, tmp_path)
    found = prepare_data(
        config.data, tokenizer, 0, tmp_path / "tasks", said.append, workers.tokenise
    )
    assert any("parts as tasks on" in line for line in said)
    assert content(found) == content(alone)
    assert_nothing_left()


@pytest.mark.slow
def test_groups_find_what_one_process_finds(inputs: Inputs, tmp_path: Path) -> None:
    wanted = jobs(
        inputs, tmp_path, PromoteConfig(metrics=["loss", "rouge", "reward"], max_new_tokens=4)
    )
    said: list[str] = []
    found = groups(inputs.config(), tmp_path, said.append).each(run_job, wanted)
    assert_nothing_left()
    assert_same(found, wanted)
    assert len({one.figures["eval_loss"] for one in found}) == 3
    assert sum(line.startswith("computing on 1 worker (node ") for line in said) == 3


def test_a_key_that_workers_lack_is_missed_first(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "not set where the cluster was started")
    config = inputs.config(model__path="somebody/model")
    with pytest.raises(ClusterError, match=r"HF_TOKEN on node .* is not set for workers"):
        groups(config, tmp_path).alone(_never, tell=lambda line: None)
    assert_nothing_left()


def _never(tell: Tell) -> None:
    raise AssertionError


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["fsdp", "deepspeed"])
def test_a_model_of_a_sharded_run_is_measured_in_parts(
    inputs: Inputs, tmp_path: Path, strategy: str
) -> None:
    wanted = jobs(inputs, tmp_path, SETTINGS, count=1)
    config = inputs.config(
        method={"name": "full"}, parallel__strategy=strategy, parallel__workers=2
    )
    said: list[str] = []
    found = groups(config, tmp_path, said.append).each(_measured_in_parts, wanted)
    assert_same([measured for measured, _ in found], wanted)
    assert said[0].startswith("computing on 2 workers (node ")
    held, whole = found[0][1]
    assert held < 0.6 * whole  # each worker has half of the weights
    assert_nothing_left()


def _measured_in_parts(job: Job, strategy: Strategy) -> tuple[Measured, tuple[int, int]]:
    """And the elements that this rank holds of the model, and those of all of it."""
    from raytune_ft.evaluate.context import runner_of
    from raytune_ft.model.load import load_tokenizer

    runner = runner_of(job.model, load_tokenizer(job.model), strategy=strategy)
    parts = [strategy.part(n, p.detach()) for n, p in runner.model.named_parameters()]
    held = sum(part.values.numel() for part in parts)
    whole = sum(p.numel() for p in runner.model.parameters())
    return run_job(job, strategy), (held, whole)


@pytest.mark.slow
def test_an_error_of_ours_stays_one(inputs: Inputs, tmp_path: Path) -> None:
    own = groups(inputs.config(), tmp_path)
    wanted = jobs(inputs, tmp_path, PromoteConfig(metrics=["answer"], max_new_tokens=4))
    with pytest.raises(DataError, match="finds no answer in any of"):
        own.each(run_job, wanted)
    (tmp_path / "1" / "model.safetensors").unlink()
    with pytest.raises(ModelError):
        own.each(run_job, [wanted[1], wanted[1]])
    with pytest.raises(FileNotFoundError):
        own.alone(_read, tmp_path / "none", tell=print)
    assert_nothing_left()


def _read(path: Path, tell: Tell) -> str:
    tell(f"reading {path.name}")
    return path.read_text()


@pytest.mark.slow
def test_lines_of_a_worker_are_told(inputs: Inputs, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("found")
    said: list[str] = []
    own = groups(inputs.config(), tmp_path, said.append)
    assert own.alone(_read, tmp_path / "a.txt", tell=said.append) == "found"
    assert said[-1] == "reading a.txt"


def _wait(path: Path, tell: Tell) -> None:
    path.touch()
    time.sleep(600)


@pytest.mark.slow
def test_an_interrupt_ends_the_workers(inputs: Inputs, tmp_path: Path) -> None:
    begun = tmp_path / "begun"

    def interrupt() -> None:
        while not begun.exists():
            time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Thread(target=interrupt, daemon=True).start()
    try:
        with pytest.raises(KeyboardInterrupt):
            groups(inputs.config(), tmp_path).alone(_wait, begun, tell=print)
    finally:
        signal.signal(signal.SIGINT, before)
    assert_nothing_left()
