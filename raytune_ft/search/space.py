"""The search space: config lines as Optuna distributions, and drawn values as config values.

Does not import Ray.
"""

from __future__ import annotations

import json
import logging
import sqlite3
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.exceptions import StorageInternalError
from optuna.storages import BaseStorage, RDBStorage
from sqlalchemy import URL, QueuePool
from sqlalchemy.dialects.sqlite import dialect as SQLiteDialect
from sqlalchemy.exc import NoSuchModuleError, SQLAlchemyError

from raytune_ft.config.environment import expand_text, without_secrets
from raytune_ft.config.explain import shown_value
from raytune_ft.config.search import Distribution, SearchConfig
from raytune_ft.errors import StorageError, first_line
from raytune_ft.layout import STUDY

CONNECT_TIMEOUT_S = 8
MAX_REASON = 200
SERVERS = ("postgresql", "mysql", "mariadb")
DRIVERS = {"postgresql": "postgresql+psycopg"}  # the driver that the `postgres` extra installs


def study_url(search: SearchConfig, folder: Path) -> str:
    """Where the study of a sweep in `folder` is; ConfigError where a variable is not set."""
    if search.storage is None:
        return f"sqlite:///{folder / STUDY}"
    return expand_text(search.storage, "search.storage")


def open_storage(url: str) -> BaseStorage:
    """Open an Optuna storage, or create it.

    Raises:
        StorageError: a wrong URL, a missing driver, or no answer within `CONNECT_TIMEOUT_S`.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    logging.getLogger("alembic").setLevel(logging.ERROR)
    scheme, _, rest = url.partition("://")
    try:
        if scheme == "sqlite":
            return _sqlite(rest.removeprefix("/"))
        if scheme.split("+")[0] not in SERVERS:
            return optuna.storages.get_storage(url)
        return RDBStorage(
            f"{DRIVERS.get(scheme, scheme)}://{rest}",
            engine_kwargs={
                "connect_args": {"connect_timeout": CONNECT_TIMEOUT_S},
                "pool_pre_ping": True,  # a connection that lay idle for one long trial may be gone
            },
        )
    except (ImportError, OSError, ValueError, SQLAlchemyError, StorageInternalError) as error:
        raise StorageError(
            f"search.storage={shown_value(url)}",
            f"cannot be opened ({without_secrets(first_line(error)[:MAX_REASON], url)})",
            "install its driver, for PostgreSQL with pip install 'raytune-ft[postgres]'"
            if isinstance(error, ImportError | NoSuchModuleError)
            else "write an Optuna URL that can be reached from here",
        ) from error


def _sqlite(path: str) -> RDBStorage:
    """The storage in a file, whose path is taken as it is: `?`, `#`, `%` and braces in an URL would
    mean something to SQLAlchemy or Optuna. Only a `?` after the last `/` begins options.
    """
    folder, slash, name = path.rpartition("/")
    file, _, options = name.partition("?")
    url = URL.create("sqlite", database=folder + slash + file, query=dict(parse_qsl(options)))
    arguments, keywords = SQLiteDialect().create_connect_args(url)
    creator = partial(sqlite3.connect, *arguments, **keywords)
    return RDBStorage("sqlite://", engine_kwargs={"creator": creator, "poolclass": QueuePool})


SCALARS = (bool, int, float, str, type(None))


def distributions(space: Mapping[str, Distribution]) -> dict[str, BaseDistribution]:
    """The Optuna distribution of every line."""
    return {key: _distribution(line) for key, line in space.items()}


def encode(space: Mapping[str, Distribution], values: Mapping[str, Any]) -> dict[str, Any]:
    """The values as Optuna stores them."""
    return {
        key: _encode(value) if space[key].kind == "choice" else value
        for key, value in values.items()
    }


def decode(space: Mapping[str, Distribution], drawn: Mapping[str, Any]) -> dict[str, Any]:
    """The values that Optuna drew, as the config file would have them."""
    return {key: _decode(space[key], value) for key, value in drawn.items()}


def _distribution(line: Distribution) -> BaseDistribution:
    values = line.values
    match line.kind:
        case "uniform":
            return FloatDistribution(float(values[0]), float(values[1]))
        case "log_uniform":
            return FloatDistribution(float(values[0]), float(values[1]), log=True)
        case "int_uniform":
            return IntDistribution(int(values[0]), int(values[1]))
        case "choice":
            return CategoricalDistribution([_encode(value) for value in values])
        case other:
            raise AssertionError(f"no distribution for {other}")


def _encode(value: Any) -> Any:
    """Optuna stores scalars; anything else is stored as its JSON."""
    return value if isinstance(value, SCALARS) else json.dumps(value, sort_keys=True)


def _decode(line: Distribution, value: Any) -> Any:
    if line.kind != "choice":
        return value
    return next(
        each for each in line.values if (type(_encode(each)), _encode(each)) == (type(value), value)
    )
