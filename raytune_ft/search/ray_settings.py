"""Ray Tune without its own output, files and signal handlers, for the time of a sweep."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

TUNE_SETTINGS = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # no CSV, JSON and TensorBoard beside our own files
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # it catches SIGINT alone; `interruptible` catches both
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # the outcome of a failed trial has no metric
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",  # one line of it is in the trial's row
    "RAY_AIR_NEW_OUTPUT": "0",  # together with verbose=0: no output of Tune's own
}


@contextmanager
def tune_storage() -> Iterator[str]:
    """Tune's own notes, pickles among them: nothing is ever read from them again."""
    path = tempfile.mkdtemp(prefix="raytune-ft-")
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


@contextmanager
def settings_of_tune() -> Iterator[None]:
    """Tune reads its settings from the environment."""
    before = {name: os.environ.get(name) for name in TUNE_SETTINGS}
    os.environ.update(TUNE_SETTINGS)
    level = logging.getLogger("ray.tune").level
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logging.getLogger("ray.tune").setLevel(level)
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
