"""Three hosts train; one is cut off in the middle of a step; two end what three began."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from raytune_ft.config.load import dump_yaml
from raytune_ft.config.schema import Config
from tests.multihost.hosts import PORT, Hosts, why_not
from tests.support.commands import ROOT
from tests.support.runs import largest_difference, losses, make_config, run

pytestmark = [pytest.mark.multihost, pytest.mark.timeout(1200)]
METHODS = {"lora": {"name": "lora", "rank": 4}, "full": {"name": "full"}}
CUT_AT = 15


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)
    with Hosts(Path(tmp_path_factory.mktemp("r")), 3) as started:
        yield started


@pytest.fixture(scope="module")
def undisturbed(
    inputs: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """The same runs in one process, without Ray."""
    root = tmp_path_factory.mktemp("single")
    for name in METHODS:
        run(config_of(inputs, name), root / name)
    return {name: root / name for name in METHODS}


def config_of(inputs: tuple[Path, Path], method: str, **changes: object) -> Config:
    dotted = {key.replace("__", "."): value for key, value in changes.items()}
    return make_config(*inputs, {"method": METHODS[method], **dotted})


def test_a_stranger_is_refused(hosts: Hosts) -> None:
    environment = hosts.environment | {"RAY_AUTH_TOKEN": "0" * 64}
    done = subprocess.run(
        [*hosts.on(2, "ray.scripts.scripts"), "status", f"--address={hosts.address(1)}:{PORT}"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode != 0
    assert "Unauthenticated" in done.stdout + done.stderr


@pytest.mark.parametrize("strategy", ["fsdp", "deepspeed"])
@pytest.mark.parametrize("method", METHODS)
def test_two_hosts_end_what_three_began(
    hosts: Hosts,
    inputs: tuple[Path, Path],
    undisturbed: dict[str, Path],
    tmp_path: Path,
    method: str,
    strategy: str,
) -> None:
    config = config_of(
        inputs,
        method,
        storage=str(tmp_path),
        parallel__strategy=strategy,
        parallel__workers=[2, 3],
        train__eval_every_examples=70,
    )
    (tmp_path / "config.yaml").write_text(dump_yaml(config))
    began = time.monotonic()
    with (tmp_path / "log").open("w") as log:
        driver = subprocess.Popen(
            [*hosts.on(1, "raytune_ft"), "train", str(tmp_path / "config.yaml")],
            cwd=ROOT,
            env=hosts.environment | {"RAY_ADDRESS": f"{hosts.address(1)}:{PORT}"},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    try:
        done = wait_for_steps(tmp_path / "run", driver, tmp_path / "log")
        cut_at = time.monotonic()
        hosts.cut(3)
        assert hosts.processes(3) == []
        code = driver.wait(timeout=400)
    finally:
        driver.kill()
        driver.wait()
    text = (tmp_path / "log").read_text()
    ended = time.monotonic()
    hosts.mend(3)
    assert code == 0, text
    assert json.loads((tmp_path / "run" / "result.json").read_text())["status"] == "completed"
    groups = [
        line.partition(" (")[0] for line in text.splitlines() if line.startswith("training on")
    ]
    assert groups == ["training on 3 workers", "training on 2 workers"]
    assert CUT_AT <= done < 40
    difference = largest_difference(tmp_path / "run", undisturbed[method])
    print(
        f"{method} {strategy}: cut after step {done}, {cut_at - began:.0f} s; "
        f"ended {ended - cut_at:.0f} s later; differs by {max(difference):.1e}"
    )
    assert max(difference) < 1e-5


def wait_for_steps(run_dir: Path, driver: subprocess.Popen[bytes], log: Path) -> int:
    """Until some are done; how many."""
    deadline = time.monotonic() + 480
    while True:
        done = len(losses(run_dir)) if (run_dir / "metrics.jsonl").exists() else 0
        if done >= CUT_AT:
            return done
        assert driver.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.02)
