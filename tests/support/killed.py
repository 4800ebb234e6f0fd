"""`raytune-ft` that kills itself at a chosen moment:

    python -m tests.support.killed said 5 17 train CONFIG ...
    python -m tests.support.killed step 7 0 train CONFIG ...

`said`: in the 17th token of the fifth time that the model answers prompts, those of evaluations
too. `step`: in the forward pass of the seventh step.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

from raytune_ft.model import sampling
from raytune_ft.train import loop, speaker


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _in_token(number: int, token: int) -> None:
    sample, choose, count = sampling.sample_groups, sampling.choose, [0, 0]

    def counted(*arguments: Any, **settings: Any) -> Any:
        count[:] = [count[0] + 1, 0]
        return sample(*arguments, **settings)

    def chosen(*arguments: Any) -> Any:
        count[1] += 1
        if count == [number, token]:
            _die()
        return choose(*arguments)

    speaker.sample_groups, sampling.choose = counted, chosen


def _in_step(number: int) -> None:
    accumulate, calls = loop.accumulate_gradients, [0]

    def counted(*arguments: Any) -> Any:
        calls[0] += 1
        if calls[0] == number:
            _die()
        return accumulate(*arguments)

    loop.accumulate_gradients = counted


if __name__ == "__main__":
    kind, number, token, *sys.argv[1:] = sys.argv[1:]
    if kind == "said":
        _in_token(int(number), int(token))
    else:
        _in_step(int(number))
    from raytune_ft.cli import main

    main()
