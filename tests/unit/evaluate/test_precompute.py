"""A teacher's logits on disk: what they are, when they are computed, and when they are refused."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from raytune_ft.cli import run_command
from raytune_ft.config.schema import Config, ModelConfig
from raytune_ft.data.prepare import prepare_data
from raytune_ft.data.prepared import PreparedData, open_prepared
from raytune_ft.data.report import check_same
from raytune_ft.data.teacher_logits import first_rows, tensor_of
from raytune_ft.errors import ConfigError, DataError, ModelError, RunFailed, StorageError
from raytune_ft.evaluate.precompute import rated, taught
from raytune_ft.layout import TEACHER_LOGITS
from raytune_ft.model.load import load_tokenizer
from raytune_ft.preflight import prepare
from raytune_ft.strategy.single import Single
from raytune_ft.train.distill import (
    InMemory,
    check_others,
    logits_file,
    teacher_of,
    teacher_runner,
)
from tests.support.models import save_tiny_llama
from tests.support.objectives import config_of, save_inputs
from tests.support.runs import losses


def silent(line: str) -> None:
    """Nothing is said."""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return save_inputs(tmp_path)


def _config(root: Path, changes: dict[str, Any] | None = None) -> Config:
    kept = {"train.kd.cache": "disk", "storage": str(root / "runs")}
    return config_of(root, "kd", {**kept, **(changes or {})})


def _data(root: Path, config: Config) -> PreparedData:
    return prepare_data(config.data, load_tokenizer(config.model), 0, root / "cache")


def _refuse(*_: object) -> None:
    raise AssertionError("the teacher is run")


def test_they_are_those_of_transformers(root: Path) -> None:
    config = _config(root)
    lines: list[str] = []
    data = taught(config, _data(root, config), lines.append)
    assert data.teacher_logits is not None
    logits_NV, first = tensor_of(np.array(data.teacher_logits)), first_rows(data.train)
    file = logits_file(config, data)
    assert file is not None
    assert (len(logits_NV), logits_NV.shape[1]) == (file.rows, file.width)
    assert file.bytes == 4 * logits_NV.numel() == data.teacher_logits.nbytes
    assert f"{file.rows:,} label tokens x {file.width:,} words x 4 bytes" in lines[1]
    theirs = AutoModelForCausalLM.from_pretrained(root / "teacher").eval()
    for i in range(len(data.train)):
        ids, mask = data.train.example(i)
        given = torch.tensor(ids[None].astype(np.int64))
        with torch.no_grad():
            wanted = theirs(input_ids=given).logits[0, :-1][torch.tensor(mask[1:])]
        torch.testing.assert_close(logits_NV[first[i] : first[i + 1]], wanted)


def test_in_bfloat16_nothing_is_lost(root: Path) -> None:
    """A batch of rows in another order, beside the teacher itself."""
    config = _config(root, {"train.precision": "bfloat16"})
    lines: list[str] = []
    data = taught(config, _data(root, config), lines.append)
    strategy = Single(config.parallel, "bfloat16")
    live = InMemory(teacher_runner(config, strategy))
    layout = ((2, 0), (1, 3))
    batch = teacher_runner(config, strategy).collate(data.train, np.array([5, 9, 2, 7]), layout)
    found, wanted = teacher_of(config, data, strategy)(batch), live(batch)
    assert data.teacher_logits is not None
    assert found.dtype == torch.bfloat16
    assert data.teacher_logits.itemsize == 2
    assert not any("rounded" in line for line in lines)
    torch.testing.assert_close(found.float(), wanted, rtol=0.02, atol=0.02)
    # A rank without work takes part all the same.
    empty = teacher_runner(config, strategy).collate(data.train, np.array([], np.int64), ())
    assert teacher_of(config, data, strategy)(empty).shape == (0, found.shape[1])


def test_they_are_computed_once(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = _config(root)
    data = _data(root, config)
    before = taught(config, data, silent)
    monkeypatch.setattr("raytune_ft.evaluate.precompute.teacher_runner", _refuse)
    other = {"train.lr": 0.1, "train.kd.weight": 0.1, "train.kd.temperature": 3.0}
    assert taught(_config(root, other), data, silent).path == before.path
    # They depend on precision, data and the teacher's weights.
    for changed in ({"train.precision": "float64"}, {"data.validation": 0.3}):
        another = _config(root, changed)
        with pytest.raises(AssertionError, match="the teacher is run"):
            taught(another, _data(root, another), silent)
    save_tiny_llama(root / "teacher", seed=2)
    with pytest.raises(AssertionError, match="the teacher is run"):
        taught(config, data, silent)


def test_they_lie_beside_the_losses_of_a_curriculum(root: Path) -> None:
    config = _config(root, {"data.curriculum": {"by": "base_loss"}})
    rated_data = rated(config, _data(root, config), silent)
    both = taught(config, rated_data, silent)
    assert both.teacher_logits is not None
    np.testing.assert_array_equal(both.base_loss, rated_data.base_loss)
    assert both.path not in (rated_data.path, _data(root, config).path)


@pytest.mark.parametrize("damage", ["a bit", "the end", "the file"])
def test_a_damaged_file_is_made_anew(root: Path, damage: str) -> None:
    config = _config(root)
    data = _data(root, config)
    file = taught(config, data, silent).path / TEACHER_LOGITS
    whole = file.read_bytes()
    if damage == "a bit":
        file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    elif damage == "the end":
        file.write_bytes(whole[:-40])
    else:
        file.unlink()
    if damage != "a bit":  # which workers, who read nothing of it beforehand, see too
        with pytest.raises(RunFailed, match="cannot be read as numbers"):
            open_prepared(file.parent)
    lines: list[str] = []
    taught(config, data, lines.append)
    assert any("the teacher runs once" in line for line in lines)
    assert file.read_bytes() == whole


def test_a_pass_that_ends_early_leaves_nothing(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = _config(root)
    data = _data(root, config)

    def stop(*_: object) -> bool:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("raytune_ft.evaluate.precompute.write_logits", stop)
        with pytest.raises(KeyboardInterrupt):
            taught(config, data, silent)
    assert [path.name for path in data.path.parent.iterdir()] == [data.path.name]


def test_too_much_is_refused_before_the_teacher_runs(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("raytune_ft.evaluate.precompute.teacher_runner", _refuse)
    config = _config(root, {"train.kd.cache_limit_gib": 1e-6})
    with pytest.raises(ConfigError, match=r"would keep .* bytes\), more than train.kd.cache_lim"):
        prepare(config, silent)
    config = _config(root)
    data = prepare(config, silent)
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(StorageError, match=r"GiB free, and train\.kd\.cache=disk keeps"):
        taught(config, data, silent)


def test_without_its_logits_no_run_begins(root: Path) -> None:
    config = _config(root)
    with pytest.raises(RunFailed, match="holds no logits of"):
        teacher_of(config, _data(root, config), Single(config.parallel, "float32"))


def test_a_resume_refuses_another_teacher(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = _config(root)
    data = _data(root, config)
    kept = taught(config, data, silent).report
    saved = root / "data.json"
    saved.write_text(kept.to_json())
    check_same(saved, kept)
    check_same(saved, data.report)  # the teacher is in memory now
    save_tiny_llama(root / "teacher", seed=2)
    monkeypatch.setattr("raytune_ft.evaluate.precompute.teacher_runner", _refuse)
    with pytest.raises(DataError, match=r"train\.kd\.teacher with files of sha256 .* began with"):
        taught(config, data, silent, partial(check_same, saved))
    assert replace(kept, teacher=None, teacher_logits=None) == data.report


def test_a_teacher_that_is_none_is_named(root: Path) -> None:
    config = _config(root, {"train.kd.teacher": str(root / "nobody")})
    with pytest.raises(ModelError, match=r"^train\.kd\.teacher=.*nobody does not exist"):
        check_others(config)
    other = _config(root).model_copy(update={"model": ModelConfig(path="builtin:tiny")})
    with pytest.raises(ModelError, match="has another vocabulary"):
        check_others(other)


def test_from_the_command_line(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (root / "config.yaml").write_text(
        f"name: first\nstorage: {root}/runs\nmodel: {{path: {root}/decoder}}\n"
        f"data: {{train: {{path: {root}/rows.jsonl}}, validation: 0.2}}\n"
        f"train: {{objective: kd, kd: {{teacher: {root}/teacher, cache: disk}}, batch_size: 8,\n"
        "  max_examples: 16, precision: float32, lr_schedule: constant}\n"
    )
    command = ["train", str(root / "config.yaml")]
    refused = {
        "train.kd.teacher=builtin:tiny": "has another vocabulary",
        "train.kd.cache_limit_gib=1e-6": "write train.kd.cache_limit_gib: ",
    }
    for override, message in refused.items():
        assert run_command([*command, override]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
        assert not (root / "runs" / "first").exists()
    assert run_command(command) == 0
    assert "the teacher runs once" in capsys.readouterr().out
    assert run_command([*command, "name=second"]) == 0
    more = [*command, "--resume", "train.max_examples=32"]
    assert run_command([*more, "train.kd.cache_limit_gib=1"]) == 0
    assert "the teacher runs once" not in capsys.readouterr().out
    assert run_command([*command, "train.max_examples=32", "name=m", "train.kd.cache=memory"]) == 0
    save_tiny_llama(root / "teacher", seed=2)
    assert run_command([*command, "--resume", "train.max_examples=48"]) == 2
    assert "is not what the run began with" in capsys.readouterr().err
    kept, live = (losses(root / "runs" / name) for name in ("first", "m"))
    assert kept == pytest.approx(live, rel=1e-5)
    assert len(kept) == 4
