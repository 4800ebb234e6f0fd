"""Trackers hear what metrics.jsonl holds, fail alone, and are told no secret."""

from __future__ import annotations

import json
import socket
import struct
import threading
import time
from collections import defaultdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from raytune_ft.config.identity import config_sha256
from raytune_ft.config.load import dump_yaml
from raytune_ft.config.schema import Config, TrackingConfig
from raytune_ft.errors import ConfigError
from raytune_ft.rundir import RunSpec
from raytune_ft.train import trackers
from raytune_ft.train.trackers import identity_of
from tests.support.mlflow_server import server
from tests.support.runs import make_config, metrics, run

SHORT = {"train.max_examples": 35, "train.eval_every_examples": 14, "data.validation": 0.3}


def trained(
    inputs: tuple[Path, Path], run_dir: Path, to: list[str], **changes: Any
) -> tuple[Config, list[dict[str, Any]]]:
    tracking = {f"tracking.{key}": value for key, value in {"to": to, **changes}.items()}
    config = make_config(*inputs, SHORT | tracking | {"name": run_dir.name})
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "config.yaml").write_text(dump_yaml(config))
    assert run(config, run_dir).status == "completed"
    return config, metrics(run_dir)


def expected(lines: list[dict[str, Any]]) -> dict[str, dict[int, float]]:
    """Figure -> step -> value, as metrics.jsonl has them."""
    figures: dict[str, dict[int, float]] = defaultdict(dict)
    for line in lines:
        if "eval_loss" in line:
            figures["eval/loss"][line["step"]] = line["eval_loss"]
        else:
            figures["train/loss"][line["step"]] = line["loss"]
            figures["train/lr"][line["step"]] = line["lr"]
    assert len(figures["train/loss"]) == 5
    return figures


def events(directory: Path) -> list[Any]:
    """The records of all event files, in their order: length, its checksum, data, its checksum."""
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for file in sorted(directory.glob("events.out.tfevents.*")):
        content, at = file.read_bytes(), 0
        while at < len(content):
            (length,) = struct.unpack_from("<Q", content, at)
            found.append(Event.FromString(content[at + 12 : at + 12 + length]))
            at += 16 + length
    return found


def test_tensorboard_is_the_default(tmp_path: Path, inputs: tuple[Path, Path]) -> None:
    assert make_config(*inputs).tracking.to == ["tensorboard"]
    _, lines = trained(inputs, tmp_path / "run", ["tensorboard"])
    found: dict[str, dict[int, float]] = defaultdict(dict)
    for event in events(tmp_path / "run" / "tensorboard"):
        for value in event.summary.value:
            found[value.tag][event.step] = value.simple_value
    for figure, points in expected(lines).items():
        assert found[figure] == pytest.approx(points), figure


def test_a_resumed_run_says_from_where(tmp_path: Path, inputs: tuple[Path, Path]) -> None:
    trained(inputs, tmp_path / "run", ["tensorboard"])
    config = make_config(*inputs, SHORT | {"train.lr_schedule": "constant"})
    identity = identity_of(RunSpec(config, tmp_path / "run", tmp_path), 3)
    tracker = trackers.TensorBoard(TrackingConfig(), identity)
    tracker.close()
    last = events(tmp_path / "run" / "tensorboard")[-1]
    assert (last.step, last.session_log.status) == (4, 1)  # START: what follows replaces it


def test_one_step_in_so_many(tmp_path: Path, inputs: tuple[Path, Path]) -> None:
    trained(inputs, tmp_path / "run", ["tensorboard"], every_steps=2)
    steps = {
        event.step
        for event in events(tmp_path / "run" / "tensorboard")
        if any(value.tag == "train/loss" for value in event.summary.value)
    }
    assert steps == {2, 4}


def test_a_tracker_that_fails_is_told_and_ends_nothing(
    tmp_path: Path,
    inputs: tuple[Path, Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    class Broken:
        def __init__(self, *_: object) -> None:
            self.logged = 0

        def log(self, figures: object, step: int) -> None:
            self.logged += 1
            if self.logged == 2:
                raise ConnectionError("the server is gone\nand its rack")

        def close(self) -> None:
            raise AssertionError("it was given up")

    monkeypatch.setitem(trackers.TRACKERS, "mlflow", Broken)
    _, lines = trained(inputs, tmp_path / "run", ["mlflow", "tensorboard"])
    text = "tracking by mlflow failed; the run continues without it: ConnectionError: the server"
    assert f"warning: {text} is gone\n" in capsys.readouterr().err
    assert text in json.loads((tmp_path / "run" / "tracking.json").read_text())["mlflow_warning"]
    assert len(lines) == 9
    assert len(events(tmp_path / "run" / "tensorboard")) == 1 + 9


@pytest.mark.parametrize("password", ["hunter2", "p@s/s wor:d", "ä%"])
def test_a_password_is_not_told(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    password: str,
) -> None:
    """A client that names its server, with the password as it is and as URLs have it."""

    class Naming:
        def __init__(self, tracking: TrackingConfig, _: object) -> None:
            quoted = quote(password, safe="")
            raise ConnectionError(
                f"no answer: {tracking.uri}, http://me:{quoted}@host/x, http://h?token={quoted}"
            )

    monkeypatch.setenv("PW", password)
    monkeypatch.setitem(trackers.TRACKERS, "mlflow", Naming)
    uri = f"http://me:{password}@host:5000/x"
    written = trackers.Identity("n", "n", tmp_path, {}, None, "http://me:${PW}@host:5000/x")
    trackers.Tracked("mlflow", TrackingConfig(uri=uri), written).close()
    told = capsys.readouterr().err + (tmp_path / "tracking.json").read_text()
    assert "ConnectionError: no answer: http://***@host:5000/x, http://***@host/x" in told
    for secret in (password, quote(password), quote(password, safe=""), "me:"):
        assert secret not in told


def test_the_written_address_tells_what_is_secret(
    tmp_path: Path, inputs: tuple[Path, Path]
) -> None:
    config = make_config(*inputs, {"tracking.uri": "http://host/${PW}"})
    (tmp_path / "config.yaml").write_text(dump_yaml(config))
    identity = identity_of(RunSpec(config, tmp_path, tmp_path), None)
    assert identity.uri == "http://host/${PW}"


def test_a_tracker_that_hangs_costs_its_patience_once(
    tmp_path: Path, inputs: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    hanging = threading.Event()

    class Hanging:
        def __init__(self, *_: object) -> None:
            hanging.wait(60)

    monkeypatch.setitem(trackers.TRACKERS, "wandb", Hanging)
    monkeypatch.setattr(trackers, "CLOSE_S", 0.5)
    begun = time.monotonic()
    _, lines = trained(inputs, tmp_path / "run", ["wandb"])
    assert len(lines) == 9
    assert time.monotonic() - begun < 20
    assert "did not take all figures" in (tmp_path / "run" / "tracking.json").read_text()
    hanging.set()


def test_a_package_that_is_absent_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"tracking\.to=wandb needs the package wandb.*pip inst"):
        trackers.check_trackers(TrackingConfig(to=["wandb"]))


def test_tracking_is_no_part_of_the_experiment(inputs: tuple[Path, Path]) -> None:
    one, other = (make_config(*inputs, {"tracking.to": to}) for to in ([], ["tensorboard"]))
    assert config_sha256(one) == config_sha256(other)


def test_trials_are_grouped_and_secrets_stay_names(
    tmp_path: Path, inputs: tuple[Path, Path]
) -> None:
    config = make_config(*inputs)
    run_dir = tmp_path / "the-sweep" / "trials" / "trial-003"
    run_dir.mkdir(parents=True)
    saved = dump_yaml(config).replace(str(inputs[1]), "${DATA_URL}")
    (run_dir / "config.yaml").write_text(saved)
    found = identity_of(RunSpec(config, run_dir, tmp_path), None)
    assert (found.name, found.group) == ("run", "the-sweep")
    assert found.params["data.train.path"] == "${DATA_URL}"
    assert found.params["train.lr"] == 3e-3
    assert not any(key.startswith(("storage", "search", "tracking")) for key in found.params)


def test_nobody_listens(tmp_path: Path, inputs: tuple[Path, Path]) -> None:
    """A server that is down from the beginning, by the real client."""
    pytest.importorskip("mlflow")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    uri = f"http://me:hunter2@127.0.0.1:{port}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        _, lines = trained(inputs, tmp_path / "run", ["mlflow"], uri=uri)
    assert len(lines) == 9
    told = json.loads((tmp_path / "run" / "tracking.json").read_text())["mlflow_warning"]
    assert "failed" in told
    assert "hunter2" not in told


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_real_mlflow_server(tmp_path: Path, inputs: tuple[Path, Path]) -> None:
    mlflow = pytest.importorskip("mlflow")
    with server(tmp_path) as uri:
        lines = {}
        for name in ("trial-000", "trial-001"):
            run_dir = tmp_path / "letters" / "trials" / name
            _, lines[name] = trained(inputs, run_dir, ["mlflow"], uri=uri, project="lab")
        client = mlflow.MlflowClient(tracking_uri=uri)
        experiment = client.get_experiment_by_name("lab/letters")
        runs = client.search_runs([experiment.experiment_id])
        assert {one.info.run_name for one in runs} == {"trial-000", "trial-001"}
        for one in runs:
            assert one.info.status == "FINISHED"
            assert one.data.params["train.lr"] == "0.003"
            for figure, points in expected(lines[one.info.run_name]).items():
                history = client.get_metric_history(one.info.run_id, figure)
                assert {each.step: each.value for each in history} == pytest.approx(points)
        # A run that is resumed goes on in the same run of MLflow.
        ids = json.loads((tmp_path / "letters/trials/trial-000/tracking.json").read_text())
        identity = identity_of(
            RunSpec(make_config(*inputs), tmp_path / "letters/trials/trial-000", tmp_path), 5
        )
        again = trackers.MLflow(TrackingConfig(uri=uri, project="lab"), identity)
        again.log({"train/loss": 0.5}, 6)
        again.close()
        history = client.get_metric_history(ids["mlflow"], "train/loss")
        assert max(each.step for each in history) == 6


@pytest.mark.slow
def test_weights_and_biases_offline(
    tmp_path: Path, inputs: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a network: what it would have sent lies in the run's directory."""
    if find_spec("wandb") is None:
        pytest.skip("wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    trained(inputs, tmp_path / "letters" / "trials" / "trial-000", ["wandb"], project="lab")
    run_dir = tmp_path / "letters" / "trials" / "trial-000"
    (saved,) = (run_dir / "wandb").glob("offline-run-*/run-*.wandb")
    content = saved.read_bytes()
    for text in (b"train/loss", b"eval/loss", b"trial-000", b"letters", b"lab"):
        assert text in content
    assert "wandb_warning" not in (run_dir / "tracking.json").read_text()


@pytest.mark.slow
def test_trackio(
    tmp_path: Path, inputs: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    if find_spec("trackio") is None:
        pytest.skip("trackio is not installed")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    run_dir = tmp_path / "letters" / "trials" / "trial-000"
    _, lines = trained(inputs, run_dir, ["trackio"], project="lab")
    from trackio.sqlite_storage import SQLiteStorage

    logged = SQLiteStorage.get_logs("lab", "letters/trial-000")
    found = {row["step"]: row["train/loss"] for row in logged if "train/loss" in row}
    assert found == pytest.approx(expected(lines)["train/loss"])
    assert not (run_dir / "tracking.json").exists()
