"""Peak memory of many LoRA runs packed into one process, against one run alone.

    python benchmarks/packed_memory.py --shared ../shared

A random Llama of 24M parameters on whole problems of GSM8K. Every number of slots is a process of
its own, 0 being the ordinary loop, and each run trains, is evaluated and leaves a checkpoint. The
peak is of anonymous memory, sampled every 5 ms, with the imports in it; tensors that are freed go
back at once, see `plan_accuracy.py`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from plan_accuracy import ENVIRONMENT, Sampler
from sweep_makespan import make_job

RANK, EXAMPLES, BATCH, VALIDATION = 16, 16, 8, 8


def main() -> None:
    """Measure each in turn and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shared", type=Path, default=Path("../shared"))
    parser.add_argument("--slots", nargs="+", type=int, default=[0, 1, 4, 16])
    parser.add_argument("--run", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run is not None:
        print(measure(Path(arguments.run[0]), int(arguments.run[1])))
        return
    with tempfile.TemporaryDirectory() as folder:
        amount = argparse.Namespace(shared=arguments.shared, examples=64, trials=1)
        make_job(Path(folder), "24M", amount)
        validation = Path(folder) / "validation.jsonl"
        validation.write_text("".join(validation.read_text().splitlines(True)[:VALIDATION]))
        peaks = {slots: _in_new_process(folder, slots) for slots in arguments.slots}
    alone = peaks.get(0) or next(iter(peaks.values()))
    print("| runs at a time | peak, MiB | of one run alone |\n|---|---|---|")
    for slots, peak in peaks.items():
        print(f"| {slots or 'one, not packed'} | {peak / 2**20:.0f} | {peak / alone:.2f} |")


def _in_new_process(folder: str, slots: int) -> int:
    command = [sys.executable, __file__, "--run", folder, str(slots)]
    done = subprocess.run(
        command, env=os.environ | ENVIRONMENT, check=True, stdout=subprocess.PIPE, text=True
    )
    return int(done.stdout.split()[-1])


def measure(root: Path, slots: int) -> int:
    """Bytes at the peak of this process, which trains `slots` runs at once, or one by itself."""
    sampler = Sampler()
    import torch

    from raytune_ft.config.load import load_config
    from raytune_ft.data.prepare import prepare_data
    from raytune_ft.model.load import load_tokenizer
    from raytune_ft.packed.engine import PackedEngine, Passes
    from raytune_ft.rundir import RunSpec
    from raytune_ft.strategy.single import Single
    from raytune_ft.train.report import Silent
    from raytune_ft.train.run import run_training

    torch.set_num_threads(2)
    (root / "run.yaml").write_text(json.dumps(_config(root)), encoding="utf-8")
    config = load_config(root / "run.yaml")
    data = prepare_data(config.data, load_tokenizer(config.model), config.seed, root / "cache")
    names = [f"{slots}-{number}" for number in range(max(1, slots))]
    specs = [RunSpec(config, root / "runs" / name, data.path) for name in names]
    for spec in specs:
        spec.run_dir.mkdir(parents=True)
    if slots == 0:
        run_training(specs[0], "single", Silent())
    else:
        strategy = Single(config.parallel, config.train.precision)
        engine = PackedEngine(Passes(config, data, slots, RANK, strategy))
        for spec in specs:
            engine.enter(spec, Silent())
        ended: list[Path] = []
        while len(ended) < slots:
            ended += engine.advance()
        engine.close()
    results = [json.loads((spec.run_dir / "result.json").read_text()) for spec in specs]
    assert {result["status"] for result in results} == {"completed"}, results
    return sampler.base + sampler.stop()


def _config(root: Path) -> dict[str, Any]:
    source = {"prompt": "prompt", "completion": "completion"}
    return {
        "name": "memory",
        "storage": str(root / "runs"),
        "model": {"path": str(root / "base")},
        "method": {"name": "lora", "rank": RANK},
        "data": {
            "train": {"path": str(root / "train.jsonl"), **source},
            "validation": {"path": str(root / "validation.jsonl"), **source},
            "separator": "",
            "max_length": 256,
            "max_bad_fraction": 0.3,
        },
        "train": {"precision": "float32", "max_examples": EXAMPLES, "batch_size": BATCH},
    }


if __name__ == "__main__":
    main()
