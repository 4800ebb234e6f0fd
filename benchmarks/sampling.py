"""Sampling on a CPU: ours against `model.generate(do_sample=True)` of transformers.

    python benchmarks/sampling.py --shared ../shared

128 rows of up to 48 new tokens at temperature 1, on stories260k. Both arms run in this process and
take turns; the figure is the median of three rounds, in tokens that are kept a second. Prompts have
8 to 15 tokens and no row ends early; then a row ends with its sentence, so that rows have different
lengths; then there are 16 prompts of 140 tokens with 8 samples each.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from raytune_ft.config.sampling import SamplingConfig
from raytune_ft.model.sampling import Request, sample

ROWS, NEW, ROUNDS = 128, 48, 3
TEXT = "Once upon a time, there was a little dog named Tim. He liked to run and play all day."


def ours(model: Any, prompts: list[list[int]], ends: list[int], seed: int) -> int:
    """Tokens drawn by this package."""
    requests = [Request(ids, place) for place, ids in enumerate(prompts)]
    said = sample(model, requests, NEW, settings=SamplingConfig(), ends=ends, seed=seed)
    return sum(len(one.ids) for one in said)


def theirs(model: Any, prompts: list[list[int]], ends: list[int], seed: int) -> int:
    """Tokens drawn by transformers, up to the end token of each row."""
    torch.manual_seed(seed)
    longest = max(map(len, prompts))
    ids_BS = torch.zeros(len(prompts), longest, dtype=torch.int64)
    mask_BS = torch.zeros_like(ids_BS)
    for row, ids in enumerate(prompts):
        ids_BS[row, longest - len(ids) :] = torch.tensor(ids)
        mask_BS[row, longest - len(ids) :] = 1
    model.generation_config = GenerationConfig(
        do_sample=True, top_k=0, max_new_tokens=NEW, eos_token_id=ends, pad_token_id=0
    )
    made_BL = model.generate(input_ids=ids_BS, attention_mask=mask_BS)[:, longest:]
    return sum(_length(row, ends) for row in made_BL.tolist())


def _length(row: Sequence[int], ends: Sequence[int]) -> int:
    return next((i + 1 for i, one in enumerate(row) if one in ends), len(row))


def compare(
    model: Any, prompts: list[list[int]], ends: list[int], clock: Callable[[], float]
) -> None:
    """Print tokens a second of each arm and round."""
    arms: dict[str, Callable[..., int]] = {"ours": ours, "generate": theirs}
    speeds: dict[str, list[float]] = {name: [] for name in arms}
    for number in range(ROUNDS + 1):  # the first one warms up
        for name, arm in arms.items():
            start = clock()
            tokens = arm(model, prompts, ends, number)
            if number:
                speeds[name].append(tokens / (clock() - start))
    for name, found in speeds.items():
        rounds = ", ".join(f"{speed:,.0f}" for speed in found)
        print(f"{name:<10} {rounds}; median {statistics.median(found):,.0f} tokens/s")
    ratio = statistics.median(speeds["ours"]) / statistics.median(speeds["generate"])
    print(f"ratio      {ratio:.2f}")


def main() -> None:
    """Measure both tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shared", type=Path, required=True, help="holds models/stories260k")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="count the CPU time of this process, on a machine that others use",
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    path = options.shared / "models" / "stories260k"
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path).eval()
    ids = tokenizer(TEXT)["input_ids"]
    prompts = [ids[: 8 + row % 8] for row in range(ROWS)]
    stop = tokenizer(TEXT.split(".")[0] + ".", add_special_tokens=False)["input_ids"][-1]
    print(
        f"{os.cpu_count()} cores, {options.threads} threads, torch {torch.__version__}, "
        f"transformers {transformers.__version__}"
    )
    clock = time.process_time if options.cpu_time else time.perf_counter
    print(f"{ROWS} rows of {NEW} tokens")
    compare(model, prompts, [], clock)
    print(f"{ROWS} rows that end with their sentence, after {NEW} tokens at most")
    compare(model, prompts, [stop], clock)
    longer = (ids * 8)[:140]
    groups = [[*longer[:-1], 300 + row // 8] for row in range(ROWS)]
    print(f"{ROWS} rows of {NEW} tokens, 8 for each of {ROWS // 8} prompts of {len(longer)} tokens")
    compare(model, groups, [], clock)


if __name__ == "__main__":
    main()
