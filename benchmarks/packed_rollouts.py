"""GRPO trials that roll out together on one base, against the same trials one after another.

    python benchmarks/packed_rollouts.py --shared ../shared
    python benchmarks/packed_rollouts.py --shared ../shared --cell answers --runs 8

The cells are those of `grpo.py`. The trials differ in their learning rate. Each arm is one process,
in which a run neither imports nor starts Ray: what is compared is sampling and training.
`seconds` and `cpu_s` are those of all runs with the start of the processes of rewards, the latter
with child processes. `gap` is the largest difference of a reward of a rollout between both.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from itertools import chain
from pathlib import Path
from typing import Any

from grpo import CELLS, LR, RANK, Cell, Span, config_of, prepare, rewards_in, write_inputs


def run(cell: Cell, base: Path, root: Path, steps: int, runs: int, packed: bool) -> dict[str, Any]:
    """All runs, at once or one after another."""
    from raytune_ft.packed.engine import PackedEngine, Passes
    from raytune_ft.rundir import RunSpec
    from raytune_ft.strategy import build_strategy
    from raytune_ft.train.report import Silent
    from raytune_ft.train.run import run_training
    from raytune_ft.train.setup import build_voice

    rates = [LR * 2 ** (-number / 4) for number in range(runs)]
    configs = [config_of(cell, base, root, steps, 0, lr) for lr in rates]
    folder = Path(tempfile.mkdtemp(dir=root))
    data = prepare(configs[0], folder / "cache")
    specs = [RunSpec(each, folder / str(n), data.path) for n, each in enumerate(configs)]
    for spec in specs:
        spec.run_dir.mkdir()
    with Span() as span:
        if packed:
            strategy = build_strategy("single", configs[0].parallel, "float32")
            with build_voice(configs[0], data, strategy) as voice:
                passes = Passes(configs[0], data, runs, RANK, strategy, voice=voice)
                engine = PackedEngine(passes)
                for spec in specs:
                    engine.enter(spec, Silent())
                left = runs
                while left:
                    left -= len(engine.advance())
                engine.close()
        else:
            for spec in specs:
                run_training(spec, "single", Silent())
    rewards = [rewards_in(spec.run_dir) for spec in specs]
    return {"seconds": span.seconds, "cpu_s": span.cpu_s, "rewards": rewards}


def main() -> None:
    """Run both arms in turns and print a table; or one arm, as the turns do."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--shared", type=Path, default=Path("../shared"))
    parser.add_argument("--cell", choices=CELLS, default="stories")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--runs", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--arm", choices=["packed", "alone"], help=argparse.SUPPRESS)
    parser.add_argument("--root", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    cell = CELLS[args.cell]
    base = cell.base(args.shared)
    if args.arm is not None:
        found = run(cell, base, args.root, args.steps, args.runs[0], args.arm == "packed")
        print(json.dumps(found))
        return
    print("| runs | s, one by one | packed | ratio | CPU s, one by one | packed | ratio | gap |")
    print("|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        write_inputs(args.cell, Path(folder))
        for runs in args.runs:
            alone, packed = (
                _in_new_process(args, folder, runs, arm) for arm in ("alone", "packed")
            )
            rows = [f"{runs}"]
            for key in ("seconds", "cpu_s"):
                one, other = alone[key], packed[key]
                rows += [f"{one:.1f}", f"{other:.1f}", f"{one / other:.2f}"]
            pairs = zip(chain(*alone["rewards"]), chain(*packed["rewards"]), strict=True)
            rows.append(f"{max(abs(one - other) for one, other in pairs):.2g}")
            print("| " + " | ".join(rows) + " |", flush=True)


def _in_new_process(args: argparse.Namespace, folder: str, runs: int, arm: str) -> Any:
    command = [sys.executable, __file__, "--shared", str(args.shared), "--cell", args.cell]
    command += ["--steps", str(args.steps), "--runs", str(runs), "--arm", arm, "--root", folder]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
