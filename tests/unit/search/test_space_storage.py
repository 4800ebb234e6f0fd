"""Studies in a shared storage: a real PostgreSQL server, none at all, or another sweep's study."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from raytune_ft.config.paths import study as study_url
from raytune_ft.config.search import SearchConfig
from raytune_ft.errors import StorageError
from raytune_ft.search.sampler import JointSampler
from raytune_ft.search.space import CONNECT_TIMEOUT_S, decode, open_storage
from raytune_ft.search.study import (
    live,
    open_study,
    own_trials,
    report,
    rows,
    tell_outcome,
    unfinished,
)
from tests.support.ports import free_port
from tests.support.postgres import PASSWORD, server

SPACE = {"train.lr": {"log_uniform": [1e-5, 1e-1]}, "method.rank": {"choice": [2, 4]}}


def search_config(**changes: Any) -> SearchConfig:
    return SearchConfig.model_validate({"trials": 6, "space": SPACE, **changes})


@pytest.fixture(scope="module")
def postgres() -> Iterator[str]:
    with server() as url:
        yield url.replace("${PGTEST_PASSWORD}", PASSWORD)


def drive(search: SearchConfig, sweep_dir: Path, count: int, resume: bool) -> list[Any]:
    """Draws of at most `count` trials, each told a loss."""
    study = open_study("s", sweep_dir, search, resume)
    study.sampler = sampler = JointSampler(search, 0, ())
    drawn = []
    left = unfinished(study)
    while len(drawn) < count and (left or len(own_trials(study)) < search.trials):
        trial = live(study, left.pop(0)) if left else study.ask()
        sampler.suggest(trial)
        params = decode(search.space, trial.params)
        loss = params["train.lr"]
        report(trial, {"examples": 50, "eval_loss": loss}, "eval_loss")
        end = {"outcome": "completed", "values": [loss], "best_eval_loss": loss, "examples": 100}
        tell_outcome(trial, end)
        drawn.append(params)
    return drawn


def test_postgres_holds_a_sweep_over_a_resume(postgres: str, tmp_path: Path) -> None:
    whole = drive(search_config(), tmp_path, 6, False)
    shared = search_config(storage=postgres)
    first = drive(shared, tmp_path / "x", 2, False)
    open_study("s", tmp_path / "x", shared, True).ask()  # a driver that died before it drew
    assert first + drive(shared, tmp_path / "x", 6, True) == whole
    found = rows(open_study("s", tmp_path / "x", shared, True), shared)
    assert [row.status for row in found] == ["completed"] * 6
    with pytest.raises(StorageError, match=r"study s exists in search\.storage"):
        open_study("s", tmp_path / "y", shared, False)


def test_a_wrong_password_is_one_line_without_it(postgres: str) -> None:
    with pytest.raises(StorageError, match="password authentication failed") as caught:
        open_storage(postgres.replace(PASSWORD, "secret-and-wrong"))
    assert "secret-and-wrong" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_server_that_is_not_there_is_one_line_at_once() -> None:
    url = f"postgresql://me@127.0.0.1:{free_port()}/db"
    with pytest.raises(StorageError, match=r"^search\.storage=postgresql://me@127.* cannot be op"):
        open_storage(url)


@pytest.mark.slow
def test_a_server_that_does_not_answer_is_given_up() -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        begun = time.monotonic()
        with pytest.raises(StorageError, match="timeout expired"):
            open_storage(f"postgresql://me@127.0.0.1:{silent.getsockname()[1]}/db")
    assert time.monotonic() - begun < CONNECT_TIMEOUT_S + 5


def test_a_url_without_a_driver_says_what_to_install() -> None:
    with pytest.raises(StorageError, match=r"pip install 'raytune-ft\[postgres\]'"):
        open_storage("postgresql+nodriver://me@127.0.0.1/db")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"space": {**SPACE, "method.rank": {"choice": [2, 8]}}}, "search.space.method.rank;"),
        ({"space": {**SPACE, "seed": {"choice": [1]}}}, "search.space.seed;"),
        ({"metric": "eval_token_accuracy", "mode": "max"}, "search.metric, search.mode;"),
    ],
)
def test_a_study_of_another_search_is_refused_by_name(
    tmp_path: Path, change: dict[str, Any], named: str
) -> None:
    url = f"sqlite:///{tmp_path}/shared.db"
    open_study("s", tmp_path, search_config(storage=url), False)
    with pytest.raises(StorageError) as caught:
        open_study("s", tmp_path, search_config(storage=url, **change), True)
    assert f"study s was begun with another {named}" in str(caught.value)


def test_a_storage_without_the_sweeps_own_study_is_refused(tmp_path: Path) -> None:
    (tmp_path / "trials").mkdir()
    with pytest.raises(StorageError, match="write the storage that the sweep began with"):
        open_study("s", tmp_path, search_config(storage=f"sqlite:///{tmp_path}/new.db"), True)


ODD = ["a b?c=d#e%41{f}", "100% [ab]*;'\u00e9"]


@pytest.mark.parametrize("name", ODD)
def test_a_study_lies_in_the_sweeps_directory_whatever_its_path(tmp_path: Path, name: str) -> None:
    folder = tmp_path / name / "s"
    folder.mkdir(parents=True)
    whole = drive(search_config(), folder, 6, False)
    assert {path.name for path in folder.iterdir()} == {"study.db"}
    assert [path.name for path in tmp_path.iterdir()] == [name]
    # The same as `search.storage`, as a relative one becomes absolute.
    shared = search_config(storage=study_url("sqlite:///shared.db?timeout=9", tmp_path / name))
    assert drive(shared, folder, 6, False) == whole
    assert (tmp_path / name / "shared.db").is_file()
    assert rows(open_study("s", folder, shared, True), shared)[5].status == "completed"


def test_the_study_has_the_space_as_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CANARY", "swordfish")
    space = SPACE | {"method.targets": {"choice": [["${CANARY}_proj"], "all-linear"]}}
    search = search_config(storage=f"sqlite:///{tmp_path}/${{CANARY}}.db", space=space)
    study = open_study("s", tmp_path / "x", search, False)
    assert (tmp_path / "swordfish.db").is_file()
    assert study.user_attrs["search"]["space"] == space


def test_an_error_of_the_driver_has_no_password() -> None:
    with pytest.raises(StorageError) as caught:
        open_storage("nonsense://me:hunter2@host:port/db?password=hunter2")
    assert "hunter2" not in str(caught.value)
