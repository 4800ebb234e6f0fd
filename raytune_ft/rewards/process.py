"""The process of one reward, started by `pool`.

It speaks JSON over a socket and no pickle, since what it says may come from code of the user. In
come the keys of the reward, then lists of groups. Out go `ready` or `refused`, then for each list
one message a score, with `alive` and `counts` between, and `done`.
"""

from __future__ import annotations

import json
import math
import os
import signal
import sys
from collections import Counter
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from raytune_ft.child import serve
from raytune_ft.config.rewards import function_of, reward_of
from raytune_ft.errors import InputError
from raytune_ft.rewards.base import Broken, Group, Score, Scorer, Working, Yielded


def main(channel: Connection) -> None:
    """Serve until the other end is closed."""
    try:
        scorer = _scorer(_received(channel))
    except InputError as error:
        _send(channel, {"refused": [error.value, error.rule, error.remedy]})
        return
    except Exception as error:  # noqa: BLE001 - the file of a reward runs code of the user
        rule = f"cannot be loaded ({type(error).__name__}: {error})"
        _send(channel, {"refused": ["", rule, "correct its file"]})
        return
    ready = {
        "columns": scorer.columns,
        "together": scorer.together,
        "many": scorer.rate_all is not None,
    }
    _send(channel, {"ready": ready})
    while True:
        try:
            groups = [Group(**one) for one in _received(channel)]
        except EOFError:
            return
        try:
            for value in scorer.scores(groups):
                _send(channel, _message(value))
        except Broken as error:
            _send(channel, {"broken": str(error)})
            continue
        _send(channel, {"done": True})


def _scorer(keys: dict[str, Any]) -> Scorer:
    found = function_of(keys["name"])
    if found is not None:  # for the modules beside it
        sys.path.insert(0, str(Path(found[0]).parent))
    reward = reward_of(keys["name"])
    scorer: Scorer = reward.implementation()(reward.config.model_validate(keys))
    return scorer


def _message(value: Yielded) -> dict[str, Any]:
    if isinstance(value, Working):
        return {"alive": True}
    if isinstance(value, Counter):
        return {"counts": dict(value)}
    score = value if isinstance(value, Score) else Score(value)
    if score.value is None:
        return {"score": None, "why": score.why or "None"}
    try:
        number = float(score.value)  # bool, and numbers of numpy and torch
    except (TypeError, ValueError, OverflowError):
        return {"score": None, "why": f"{type(score.value).__name__} is not a number"}
    if not math.isfinite(number):
        return {"score": None, "why": f"{number} is not a finite number"}
    return {"score": number, "why": score.why}


def _received(channel: Connection) -> Any:
    return json.loads(channel.recv_bytes())


def _send(channel: Connection, message: dict[str, Any]) -> None:
    channel.send_bytes(json.dumps(message).encode())


if __name__ == "__main__":
    serve(main, partial(os.killpg, 0, signal.SIGKILL))
