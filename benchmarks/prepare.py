"""Rows to tokens: rows a second and memory, against `datasets.map` with TRL's tokenisation.

    python benchmarks/prepare.py --rows 20000 --rounds 2
    python benchmarks/prepare.py --kind short --rows 100000 1000000 --arms ours --processes 2

A third arm, `axolotl`, is code in the style of axolotl's, see there.

Each arm runs in a process of its own, on rows that a seeded script makes, and the arms alternate.
Both write input ids and a mask of the assistant's tokens by the same template and tokenizer. TRL's
arm is what `SFTTrainer` does with `assistant_only_loss=True`: `apply_chat_template` on each row
through `datasets.map`, then the cut to `max_length`; of short rows, a prompt and a completion of a
few words, it tokenises the prompt and the whole. Ours also looks for rows that the template
loses something of, draws a validation split and counts duplicates and overlaps.

Memory is that of the whole command, seen 20 times a second: the resident pages of the largest
process, and of all of them together.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

EVERY_S = 0.05
MAX_LENGTH = 512
TEXT = (
    "the of model data learn train token fast green river house number seven why because answer "
    "question people water light run walk blue seed layer graph"
)
WORDS = TEXT.split()


def short_row(draw: random.Random, number: int) -> dict[str, str]:
    """A prompt and a completion of a few words, some 75 bytes."""
    asked, said = (" ".join(draw.choices(WORDS, k=count)) for count in (3, 4))
    return {"prompt": f"{asked} {number}", "completion": said}


def write_rows(path: Path, count: int, kind: str) -> None:
    """Conversations of one or two questions with their answers, some 770 bytes each; or short rows
    of some 75 bytes.
    """
    draw = random.Random(0)
    with path.open("w") as file:
        for number in range(count):
            if kind == "short":
                file.write(json.dumps(short_row(draw, number)) + "\n")
                continue
            turns = []
            for _ in range(draw.randint(1, 2)):
                asked = " ".join(draw.choices(WORDS, k=draw.randint(8, 40)))
                said = " ".join(draw.choices(WORDS, k=draw.randint(10, 90)))
                turns.append({"role": "user", "content": f"{asked} {number}?"})
                turns.append({"role": "assistant", "content": f"{said}."})
            file.write(json.dumps({"messages": turns}) + "\n")


def ours(rows: Path, model: str, folder: Path, processes: int, kind: str) -> int:
    """Tokens of both splits."""
    from raytune_ft.config.data import DataConfig
    from raytune_ft.data.processes import started_ahead

    source = {"path": str(rows)}
    if kind == "chat":
        source |= {"format": "messages", "chat_template": "chatml"}
    data = DataConfig.model_validate({"train": source, "max_length": MAX_LENGTH})
    with started_ahead(data, processes) as workers:  # as commands do, before they import the rest
        from transformers import AutoTokenizer

        from raytune_ft.data.prepare import prepare_data

        tokenizer = AutoTokenizer.from_pretrained(model)
        prepared = prepare_data(data, tokenizer, 0, folder, workers=workers)
    return sum(split.tokens for split in prepared.report.splits.values())


def trl(rows: Path, model: str, folder: Path, processes: int, kind: str) -> int:
    """Tokens of the mapped data set."""

    def tokenise(example: Any, tokenizer: Any, template: str) -> dict[str, list[int]]:
        if kind == "short":
            prompt = tokenizer(example["prompt"] + "\n")["input_ids"]
            ids = tokenizer(example["prompt"] + "\n" + example["completion"])["input_ids"]
            mask = [0] * len(prompt) + [1] * (len(ids) - len(prompt) + 1)
            return {"input_ids": [*ids, tokenizer.eos_token_id], "assistant_masks": mask}
        found = tokenizer.apply_chat_template(
            example["messages"],
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
            chat_template=template,
        )
        return {name: found[name] for name in ("input_ids", "assistant_masks")}

    return mapped(rows, model, folder, processes, tokenise)


def axolotl(rows: Path, model: str, folder: Path, processes: int, kind: str) -> int:
    """The same by code in the style of axolotl's `ChatTemplateStrategy`, of chats: each turn is
    found by tokenising the turns up to it, with its content and with another one.
    """

    def tokenise(example: Any, tokenizer: Any, template: str) -> dict[str, list[int]]:
        def ids_of(turns: list[Any]) -> list[int]:
            found = tokenizer.apply_chat_template(turns, tokenize=True, chat_template=template)
            return list(found["input_ids"])

        turns = example["messages"]
        ids = ids_of(turns)
        mask = [0] * len(ids)
        for number, turn in enumerate(turns):
            other = ids_of([*turns[:number], {**turn, "content": "[[dummy_message]]"}])
            own = ids_of(turns[: number + 1])
            start = next(
                n for n, pair in enumerate(zip(own, other, strict=False)) if len({*pair}) > 1
            )
            behind = zip(reversed(own), reversed(other), strict=False)
            stop = len(own) - next(n for n, pair in enumerate(behind) if len({*pair}) > 1)
            if turn["role"] == "assistant":
                mask[start : stop + 1] = [1] * (stop + 1 - start)  # with the token that ends it
        return {"input_ids": ids, "assistant_masks": mask}

    assert kind == "chat", "the arm is for chats"
    return mapped(rows, model, folder, processes, tokenise)


def mapped(
    rows: Path,
    model: str,
    folder: Path,
    processes: int,
    tokenise: Callable[[Any, Any, str], dict[str, list[int]]],
) -> int:
    """Tokens of the data set that `datasets.map` makes of the rows."""
    import datasets
    import pyarrow.compute as pc
    from transformers import AutoTokenizer

    import raytune_ft.data

    os.environ["HF_DATASETS_CACHE"] = str(folder)
    tokenizer = AutoTokenizer.from_pretrained(model)
    templates = Path(raytune_ft.data.__file__).parent / "chat_templates"
    template = (templates / "chatml.jinja").read_text().replace("'<|im_end|>'", "eos_token")

    def cut(batch: dict[str, list[list[int]]]) -> dict[str, list[list[int]]]:
        return {name: [one[:MAX_LENGTH] for one in found] for name, found in batch.items()}

    data = datasets.load_dataset("json", data_files=str(rows), cache_dir=str(folder))["train"]
    several = processes if processes > 1 else None
    own = {"tokenizer": tokenizer, "template": template}
    data = data.map(tokenise, remove_columns=data.column_names, num_proc=several, fn_kwargs=own)
    data = data.map(cut, batched=True, num_proc=several)
    return int(pc.sum(pc.list_value_length(data.data["input_ids"])).as_py())


ARMS = {"ours": ours, "trl": trl, "axolotl": axolotl}


def measure(arm: str, rows: Path, model: str, processes: int, kind: str) -> dict[str, float]:
    """Run an arm in a process of its own and watch it."""
    with tempfile.TemporaryDirectory() as folder:
        line = [sys.executable, __file__, "--arm", arm, "--file", str(rows), "--model", model]
        line += ["--processes", str(processes), "--folder", folder, "--kind", kind]
        begun = time.monotonic()
        process = subprocess.Popen(
            line, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        watched, largest, together = psutil.Process(process.pid), 0, 0
        while process.poll() is None:
            sizes = []
            for one in (watched, *_children(watched)):
                try:
                    sizes.append(one.memory_info().rss)
                except psutil.Error:
                    continue
            largest, together = max(largest, *sizes, 0), max(together, sum(sizes))
            time.sleep(EVERY_S)
        assert process.stdout is not None
        assert process.returncode == 0, arm
        found = json.loads(process.stdout.read().splitlines()[-1])
    wall = time.monotonic() - begun
    return {**found, "wall_s": wall, "largest_mib": largest / 2**20, "all_mib": together / 2**20}


def _children(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children(recursive=True)
    except psutil.Error:
        return []


def main() -> None:
    """Print a table, or run one arm."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[20_000])
    parser.add_argument("--kind", choices=("chat", "short"), default="chat")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=["ours", "trl"])
    parser.add_argument("--model", help="a directory with a fast tokenizer; default: builtin:tiny")
    for name in ("--arm", "--file", "--folder"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.arm:
        own = psutil.Process()
        begun, before = time.monotonic(), own.cpu_times()
        tokens = ARMS[asked.arm](
            Path(asked.file), asked.model, Path(asked.folder), asked.processes[0], asked.kind
        )
        after = os.times()
        cpu = after.user + after.system + after.children_user + after.children_system
        cpu -= before.user + before.system
        print(json.dumps({"s": time.monotonic() - begun, "cpu_s": cpu, "tokens": tokens}))
        return
    from raytune_ft.model.load import resolve_model_path

    model = asked.model or resolve_model_path("builtin:tiny")
    print("| rows | arm | processes | rows/s | rows/s of CPU | largest MiB | all MiB | tokens |")
    print("|---|---|---|---|---|---|---|---|")
    for count in asked.rows:
        with tempfile.TemporaryDirectory() as folder:
            rows = Path(folder) / "rows.jsonl"
            write_rows(rows, count, asked.kind)
            cells = [(arm, processes) for processes in asked.processes for arm in asked.arms]
            found: dict[tuple[str, int], list[dict[str, float]]] = {cell: [] for cell in cells}
            for _ in range(asked.rounds):
                for arm, processes in cells:
                    found[arm, processes].append(measure(arm, rows, model, processes, asked.kind))
        for (arm, processes), each in found.items():
            speeds = ", ".join(f"{count / one['s']:.0f}" for one in each)
            effort = statistics.median(count / one["cpu_s"] for one in each)
            largest, together = (
                max(one[name] for one in each) for name in ("largest_mib", "all_mib")
            )
            print(
                f"| {count:,} | {arm} | {processes} | {speeds} | {effort:.0f} | {largest:.0f} "
                f"| {together:.0f} | {each[0]['tokens']:.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
