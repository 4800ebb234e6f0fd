"""Where studies are kept: a file, or a database server. Imports no ray."""

from __future__ import annotations

import logging

import optuna
from optuna.exceptions import StorageInternalError
from optuna.storages import BaseStorage
from sqlalchemy.exc import NoSuchModuleError, SQLAlchemyError

from raytune_ft.config.explain import shown_value
from raytune_ft.errors import StorageError

STUDY_FILE = "study.db"
CONNECT_TIMEOUT_S = 8
MAX_REASON = 200
SERVERS = ("postgresql", "mysql", "mariadb")
DRIVERS = {"postgresql": "postgresql+psycopg"}  # the driver that the `postgres` extra installs


def open_storage(url: str) -> BaseStorage:
    """What Optuna calls a storage, made where there is none yet.

    Raises:
        StorageError: no such URL, no driver, or nobody answers there within `CONNECT_TIMEOUT_S`.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    logging.getLogger("alembic").setLevel(logging.ERROR)
    scheme, _, rest = url.partition("://")
    try:
        if scheme.split("+")[0] not in SERVERS:
            return optuna.storages.get_storage(url)
        return optuna.storages.RDBStorage(
            f"{DRIVERS.get(scheme, scheme)}://{rest}",
            engine_kwargs={
                "connect_args": {"connect_timeout": CONNECT_TIMEOUT_S},
                "pool_pre_ping": True,  # a connection that lay idle for one long trial may be gone
            },
        )
    except (ImportError, OSError, ValueError, SQLAlchemyError, StorageInternalError) as error:
        raise StorageError(
            f"search.storage={shown_value(url)}",
            f"cannot be opened ({_reason(error)})",
            "install its driver, for PostgreSQL with pip install 'raytune-ft[postgres]'"
            if isinstance(error, ImportError | NoSuchModuleError)
            else "write an Optuna URL that answers here",
        ) from error


def _reason(error: BaseException) -> str:
    """The first line of it; drivers go on with hints and links."""
    lines = str(error).splitlines() or [type(error).__name__]
    return lines[0][:MAX_REASON]
