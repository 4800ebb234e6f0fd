"""How much memory and time it takes to fold a LoRA adapter into its base, against PEFT.

A random Llama is written in bfloat16 straight into safetensors files, and an adapter of rank 16 on
all of its linear layers. Each arm is a process of its own:

    ours          raytune_ft: tensor by tensor; in float32, rounded once
    ours, check   the same with the check of the written model against base + adapter in PEFT
    peft          from_pretrained in bfloat16, merge_and_unload, save_pretrained
    peft float32  the same in float32, rounded before it is saved

Sizes are in megabytes of 10^6 bytes.

    anonymous  the most RssAnon that the process had, read every 5 ms: memory that is its own alone
    high water VmHWM: with pages of mapped files and the libraries that it has imported
    bound      the largest shard + 1000
    s, CPU s   from the first import to the last byte

Then ours is killed by SIGKILL three times on its way, each time further on, and finished: its files
must be those of the undisturbed one, byte for byte.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from load_memory import MB, write_model
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from raytune_ft.config.section import parse_size

ARMS = {
    "ours": """
from raytune_ft.merge.fold import open_checkpoint, write_model
from raytune_ft.config.schema import ModelConfig
model = ModelConfig(path=base)
with open_checkpoint(model, Path(adapter)) as opened:
    write_model(model, opened, Path(target), shard, torch.bfloat16, print)
""",
    "ours, check": """
from raytune_ft.merge.fold import fold
from raytune_ft.config.schema import ModelConfig
torch.manual_seed(0)
examples = [torch.randint(0, 32000, (64,)) for _ in range(8)]
print(fold(ModelConfig(path=base), Path(adapter), Path(target), examples, shard, tell=print))
""",
    "peft": """
from transformers import AutoModelForCausalLM
from peft import PeftModel
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
merged = PeftModel.from_pretrained(model, adapter).merge_and_unload()
merged.save_pretrained(target, max_shard_size=shard)
""",
    "peft float32": """
from transformers import AutoModelForCausalLM
from peft import PeftModel
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
merged = PeftModel.from_pretrained(model, adapter).merge_and_unload().to(torch.bfloat16)
merged.save_pretrained(target, max_shard_size=shard)
""",
}
HEAD = """
import sys, torch, warnings
from pathlib import Path
warnings.simplefilter("ignore")
base, adapter, target, shard = sys.argv[1:5]
"""


def write_adapter(base: Path, directory: Path, rank: int) -> None:
    """Random factors, without a model around them."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base))
        config = LoraConfig(
            r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM"
        )
        adapted = get_peft_model(model, config)
    torch.manual_seed(1)
    state = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    drawn = {name: torch.randn(value.shape) * 0.01 for name, value in state.items()}
    directory.mkdir()
    save_file(drawn, directory / "adapter_model.safetensors", {"format": "pt"})
    config.inference_mode = True
    config.save_pretrained(directory)


def start(arm: str, base: Path, adapter: Path, target: Path, shard: str) -> Any:
    """The arm's process."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "TQDM_DISABLE": "1",
    }
    command = [sys.executable, "-c", HEAD + ARMS[arm], str(base), str(adapter), str(target), shard]
    return subprocess.Popen(command, env=environment)


def status(process: int) -> dict[str, int]:
    """Bytes of RssAnon and VmHWM; nothing of a process that has ended."""
    try:
        text = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return {}
    lines = dict(line.split(":", 1) for line in text.splitlines())
    return {k: int(lines[k].split()[0]) * 1024 for k in ("RssAnon", "VmHWM") if k in lines}


def measure(process: Any) -> dict[str, float]:
    """Until it ends."""
    started, peak, water = time.perf_counter(), 0, 0
    while True:
        now = status(process.pid)
        peak, water = max(peak, now.get("RssAnon", 0)), max(water, now.get("VmHWM", 0))
        ended, code, used = os.wait4(process.pid, os.WNOHANG)
        if ended:
            assert code == 0, code
            seconds = time.perf_counter() - started
            return {
                "anonymous": peak / MB,
                "water": water / MB,
                "s": seconds,
                "cpu": used.ru_utime + used.ru_stime,
            }
        time.sleep(0.005)


def shards(target: Path) -> dict[str, bytes]:
    """Files of weights and their hashes."""
    return {
        path.name: hashlib.file_digest(path.open("rb"), "sha256").digest()
        for path in sorted(target.glob("*.safetensors"))
    }


def kill_and_finish(base: Path, adapter: Path, target: Path, shard: str) -> list[int]:
    """Killed in the middle of the second, third and fourth shard; finished shards at each."""
    seen = []
    for wanted in (1, 2, 3):
        process = start("ours, check", base, adapter, target, shard)
        journal = target / ".journal.json"
        while True:
            assert process.poll() is None, "it ended before it was killed"
            done = len(json.loads(journal.read_text())["shards"]) if journal.exists() else 0
            part = [path.stat().st_size for path in target.glob(".model*.safetensors")]
            if done >= wanted and part and part[0] > parse_size(shard) / 10:
                break
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.wait()
        seen.append(len(json.loads(journal.read_text())["shards"]))
    measure(start("ours, check", base, adapter, target, shard))
    return seen


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=58)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--max-shard-size", default="1GB")
    parser.add_argument("--arms", nargs="+", default=list(ARMS))
    parser.add_argument("--kill", action="store_true", help="kill ours three times as well")
    parser.add_argument("--directory", type=Path, help="where the models go; default: temporary")
    arguments = parser.parse_args()
    failed = False
    with tempfile.TemporaryDirectory(dir=arguments.directory) as temporary:
        base, adapter = Path(temporary) / "base", Path(temporary) / "adapter"
        base.mkdir()
        count = write_model(base, arguments.layers)
        write_adapter(base, adapter, arguments.rank)
        size = sum(path.stat().st_size for path in base.glob("*.safetensors"))
        print(f"{count / 1e9:.2f}B parameters, {size / 1e9:.2f} GB\n")
        print("| arm | anonymous | high water | bound | s | CPU s |")
        print("|---" * 6 + "|", flush=True)
        shard = arguments.max_shard_size
        for number, arm in enumerate(arguments.arms):
            target = Path(temporary) / f"out-{number}"
            process = start(arm, base, adapter, target, shard)
            found = measure(process)
            largest = max(path.stat().st_size for path in target.glob("*.safetensors")) / MB
            bound = largest + 1000
            failed |= arm.startswith("ours") and found["water"] > bound
            cells = [f"{found['anonymous']:.0f}", f"{found['water']:.0f}", f"{bound:.0f}"]
            print(f"| {arm} | {' | '.join(cells)} | {found['s']:.1f} | {found['cpu']:.1f} |")
            sys.stdout.flush()
            subprocess.run(["rm", "-rf", str(target)], check=True)
        if arguments.kill:
            once, killed = Path(temporary) / "once", Path(temporary) / "killed"
            measure(start("ours", base, adapter, once, shard))
            seen = kill_and_finish(base, adapter, killed, shard)
            same = shards(once) == shards(killed)
            failed |= not same
            print(f"\nkilled with {seen} shards done; the same {len(shards(once))} files: {same}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
