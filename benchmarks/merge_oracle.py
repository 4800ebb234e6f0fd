"""Merges against mergekit: the same random models through both, tensor by tensor.

A random Llama in float32 and three models near it are merged by mergekit, run as a command from an
environment of its own, and by this package. Differences are absolute, over all tensors.

    python -m venv ENV && ENV/bin/pip install torch==2.13.0 && ENV/bin/pip install mergekit
    python benchmarks/merge_oracle.py --mergekit ENV/bin/mergekit-yaml

dare draws at random, so that no two programs agree: it is compared at density 1, and by the share
of elements that it moves and the mean size of a delta, over ten seeds, at density 0.5.
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

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaForCausalLM

from raytune_ft.config.schema import ModelConfig
from raytune_ft.merge import methods
from raytune_ft.merge.fold import write_model
from raytune_ft.merge.members import open_members
from raytune_ft.merge.methods import MergeSettings

# name: ours, our settings, theirs, their parameters, of every model
CASES: dict[str, tuple[str, MergeSettings, str, dict[str, Any], dict[str, Any]]] = {
    "linear": ("linear", MergeSettings(), "linear", {}, {"weight": 1.0}),
    "linear, weights 1 2 5": (
        "linear",
        MergeSettings(weights=(1, 2, 5)),
        "linear",
        {},
        {"weight": [1.0, 2.0, 5.0]},
    ),
    "slerp, t = 0.3": ("slerp", MergeSettings(position=0.3), "slerp", {"t": 0.3}, {}),
    "task_arithmetic, 0.4": (
        "task_arithmetic",
        MergeSettings(scale=0.4),
        "task_arithmetic",
        {"lambda": 0.4},
        {"weight": 1.0},
    ),
    "ties, density 0.2": (
        "ties",
        MergeSettings(density=0.2),
        "ties",
        {},
        {"weight": 1.0, "density": 0.2},
    ),
    "ties, density 0.5, 0.7": (
        "ties",
        MergeSettings(density=0.5, scale=0.7),
        "ties",
        {"lambda": 0.7},
        {"weight": 1.0, "density": 0.5},
    ),
    "dare, density 1": (
        "dare",
        MergeSettings(density=1.0, scale=0.4),
        "dare_linear",
        {"lambda": 0.4},
        {"weight": 1.0, "density": 1.0},
    ),
    # mergekit divides by no number of agreeing members here, and we do as in ties.
    "dare_ties, density 1": (
        "dare_ties",
        MergeSettings(density=1.0),
        "dare_ties",
        {"normalize": True},
        {"weight": 1.0, "density": 1.0},
    ),
}
DARE = "dare", "dare_linear"
TIED = 3
"""Elements of the very magnitude at which ties trims: mergekit keeps some of them, we keep all."""


def write_models(folder: Path, layers: int) -> list[Path]:
    """The base and three models near it."""
    config = LlamaConfig(
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=layers,
        num_attention_heads=8,
        vocab_size=4000,
        dtype="float32",
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    paths = [folder / name for name in ("base", "one", "two", "three")]
    model.save_pretrained(paths[0])
    weights = load_file(paths[0] / "model.safetensors")
    for path in paths[1:]:
        config.save_pretrained(path)
        near = {n: w + 0.01 * torch.randn_like(w) for n, w in weights.items()}
        save_file(near, path / "model.safetensors", {"format": "pt"})
    return paths


def by_mergekit(
    command: Path,
    paths: list[Path],
    name: str,
    parameters: dict[str, Any],
    each: dict[str, Any],
    out: Path,
    seed: int = 0,
) -> dict[str, Tensor]:
    """What `mergekit-yaml` writes."""
    chosen = paths[1:3] if name == "slerp" else paths[1:]
    models = []
    for index, path in enumerate(chosen):
        own = {k: v[index] if isinstance(v, list) else v for k, v in each.items()}
        models.append({"model": str(path), **({"parameters": own} if own else {})})
    base = {"linear": {}, "slerp": {"base_model": str(paths[1])}}
    recipe = {
        "merge_method": name,
        **base.get(name, {"base_model": str(paths[0])}),
        "models": models,
        "parameters": parameters,
        "dtype": "float32",
    }
    file = out.with_suffix(".yaml")
    file.write_text(json.dumps(recipe))
    done = subprocess.run(
        [command, file, out, "--random-seed", str(seed)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    if done.returncode:
        sys.exit(done.stderr[-2000:])
    found: dict[str, Tensor] = {}
    for path in out.glob("*.safetensors"):
        found |= load_file(path)
    return found


def by_us(paths: list[Path], name: str, settings: MergeSettings, out: Path) -> dict[str, Tensor]:
    """What this package writes."""
    model = ModelConfig(path=str(paths[0]))
    with open_members(model, paths[1:]) as opening:
        chosen = (0, 1) if name == "slerp" else (0, 1, 2)
        merged = opening.merged(getattr(methods, name.upper()), chosen, settings)
        write_model(model, merged, out, "5GB", torch.float32, lambda line: None)
    return load_file(out / "model.safetensors")


def moved(found: dict[str, Tensor], base: dict[str, Tensor]) -> tuple[float, float]:
    """Share of the elements that differ from the base, and the mean delta's size."""
    deltas = torch.cat([(found[name] - base[name]).flatten() for name in base])
    return (deltas != 0).float().mean().item(), deltas.abs().mean().item()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mergekit", type=Path, required=True, help="its mergekit-yaml")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--seeds", type=int, default=10, help="of dare at density 0.5")
    arguments = parser.parse_args()
    failed = False
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        paths = write_models(folder, arguments.layers)
        base = load_file(paths[0] / "model.safetensors")
        print(
            "| merge | tensors | elements | largest weight | largest difference | elements > 1e-6 |"
        )
        print("|---" * 6 + "|", flush=True)
        for number, (case, (ours, settings, theirs, shared, each)) in enumerate(CASES.items()):
            one = by_us(paths, ours, settings, folder / f"ours{number}")
            other = by_mergekit(
                arguments.mergekit, paths, theirs, shared, each, folder / f"theirs{number}"
            )
            failed |= one.keys() != other.keys()
            differences = torch.cat([(one[n] - other[n]).abs().flatten() for n in one])
            largest = max(weight.abs().max().item() for weight in other.values())
            odd = int((differences > 1e-6).sum())
            failed |= odd > (TIED if ours == "ties" else 0)
            worst = differences.max().item()
            print(
                f"| {case} | {len(one)} | {len(differences):,} | {largest:.2f} | {worst:.1e} "
                f"| {odd} |",
                flush=True,
            )
        print("\n| dare, density 0.5 | moved elements | mean size of a delta |")
        print("|---" * 3 + "|", flush=True)
        for who in ("ours", "mergekit"):
            figures = []
            for seed in range(arguments.seeds):
                out = folder / f"{who}-{seed}"
                if who == "ours":
                    settings = MergeSettings(density=0.5, scale=0.4, seed=seed)
                    found = by_us(paths, DARE[0], settings, out)
                else:
                    each = {"weight": 1.0, "density": 0.5}
                    found = by_mergekit(
                        arguments.mergekit, paths, DARE[1], {"lambda": 0.4}, each, out, seed
                    )
                figures.append(moved(found, base))
            shares, sizes = zip(*figures, strict=True)
            print(f"| {who} | {sum(shares) / len(shares):.5f} | {sum(sizes) / len(sizes):.3e} |")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
