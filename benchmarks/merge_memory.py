"""How much memory merges of whole models take: three random Llamas of 0.54B parameters in bfloat16.

high water is VmHWM of a process of its own, with the libraries that it has imported; bound is the
largest file + 1000. Megabytes of 10^6 bytes.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from load_memory import write_model

FORMULAS = ("LINEAR", "SLERP", "TIES", "DARE_TIES")
MERGE = """
import sys, time, torch
from pathlib import Path
from raytune_ft.config.schema import ModelConfig
from raytune_ft.merge.fold import write_model
from raytune_ft.merge import methods
from raytune_ft.merge.members import open_members
folder, name = Path(sys.argv[1]), sys.argv[2]
members = [folder / f"model{number}" for number in (1, 2, 3)]
model = ModelConfig(path=str(folder / "model0"))
with open_members(model, members) as opening:
    chosen = (0, 1) if name == "SLERP" else (0, 1, 2)
    made = opening.merged(getattr(methods, name), chosen, methods.MergeSettings())
    write_model(model, made, folder / name, "200MB", torch.bfloat16, print)
status = Path("/proc/self/status").read_text().split("VmHWM:")[1]
largest = max(path.stat().st_size for path in (folder / name).glob("*.safetensors"))
water, bound = int(status.split()[0]) * 1024 / 1e6, largest / 1e6 + 1000
print(f"| {name} | {water:.0f} | {bound:.0f} | {time.process_time():.1f} |")
sys.exit(water > bound)
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--directory", type=Path, help="where the models go; default: temporary")
    arguments = parser.parse_args()
    failed = False
    with tempfile.TemporaryDirectory(dir=arguments.directory) as temporary:
        for number in range(4):
            folder = Path(temporary) / f"model{number}"
            folder.mkdir()
            write_model(folder, arguments.layers)
        print("| merge | high water | bound | CPU s |")
        print("|---" * 4 + "|", flush=True)
        for name in FORMULAS:
            done = subprocess.run(
                [sys.executable, "-c", MERGE, temporary, name],
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                check=False,
            )
            failed |= done.returncode != 0
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
