"""Seconds of a whole LoRA sweep: Ray Tune with a TRL trainer per trial, and ours.

    python benchmarks/sweep_makespan.py --shared ../shared --cells short --arms E F --rounds 3

Every arm is one process from its start to its end, with Ray in it; arms take turns. All draw the
same number of trials from the same space with Optuna's TPE, train each on the same budget of
examples and evaluate it as often on the same rows:

- A: Ray Tune, OptunaSearch, TRL's `SFTTrainer` in each trial, as many trials at a time as cores;
- B: A with `reuse_actors`, its processes and their rows kept from trial to trial;
- E: A with ASHA;
- C: ours, a worker group per trial (`execution: isolated`), no early stop;
- D: ours, packed, no early stop;
- F: ours, packed, with ASHA;
- G: ours, isolated, with ASHA;
- H: ours, `execution: auto`, with ASHA, which should take no longer than the faster of F and G.

TRL is given the tokens that ours trains on, since it would make others of the same text, so that
losses can be compared; it saves its trials the tokenising. Ours also keep a verified checkpoint of
each trial's best, fold and evaluate the winner, and export it; the others only search. It needs the
extra `bench`.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ARMS = {
    "A": "Tune + TRL",
    "B": "Tune + TRL, reused actors",
    "C": "ours, isolated",
    "D": "ours, packed",
    "E": "Tune + TRL, ASHA",
    "F": "ours, packed, ASHA",
    "G": "ours, isolated, ASHA",
    "H": "ours, auto, ASHA",
}
EXECUTION = {"C": "isolated", "D": "packed", "F": "packed", "G": "isolated", "H": "auto"}
CELLS = ("short", "whole", "24M")
MAX_LENGTH = 256
LR, BATCH, RANKS = (3e-4, 3e-2), (8, 16, 32), (4, 8, 16)
STEP = re.compile(r"<<([^<>=]+=)([^<>]+)>>")
ASHA_FACTOR = 3


def main() -> None:
    """Measure the arms of each cell in turn and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shared", type=Path, default=Path("../shared"))
    parser.add_argument("--cells", nargs="+", choices=CELLS, default=["short", "whole"])
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--trials", type=int, default=48)
    parser.add_argument("--examples", type=int, default=512, help="that each trial sees")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run is not None:
        run_tune(json.loads(arguments.run))
        return
    for cell in arguments.cells:
        found: dict[str, list[dict[str, float]]] = {arm: [] for arm in arguments.arms}
        with tempfile.TemporaryDirectory() as folder:
            job = make_job(Path(folder), cell, arguments)
            for number in range(arguments.rounds):
                for arm in arguments.arms:
                    found[arm].append(measure(job, arm, number))
                    print(f"{cell} {arm}: {found[arm][-1]}", file=sys.stderr, flush=True)
        print_table(cell, found)


def print_table(cell: str, found: dict[str, list[dict[str, float]]]) -> None:
    """Seconds by round, their median, and the best loss."""
    print(f"\n{cell}\n\n| arm | seconds, per round | median | best eval loss |\n|---|---|---|---|")
    medians = {}
    for arm, rounds in found.items():
        seconds = [each["seconds"] for each in rounds]
        medians[arm] = statistics.median(seconds)
        shown = ", ".join(f"{value:.0f}" for value in seconds)
        best = statistics.median(each["best"] for each in rounds)
        print(f"| {arm}: {ARMS[arm]} | {shown} | {medians[arm]:.0f} | {best:.4f} |")
    for above, below in (("E", "F"), ("B", "D"), ("A", "D"), ("C", "D"), ("G", "F"), ("H", "F")):
        if {above, below} <= medians.keys():
            print(f"\n{above}/{below}: {medians[above] / medians[below]:.2f}", flush=True)


def make_job(root: Path, cell: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """What all arms of a cell have in common, with the files that they read."""
    shared = arguments.shared.resolve()
    needed = arguments.examples + 128
    rows = short_rows(shared) if cell == "short" else whole_rows(shared)
    train, validation = rows[: arguments.examples], rows[arguments.examples : needed]
    for name, part in (("train", train), ("validation", validation)):
        text = "".join(json.dumps(row) + "\n" for row in part)
        (root / f"{name}.jsonl").write_text(text, encoding="utf-8")
    base = shared / "models/stories260k"
    if cell == "24M":
        from train_throughput import build_base

        build_base(root / "base", shared)
        base = root / "base"
    for name, part in (("train", train), ("validation", validation)):
        text = "".join(json.dumps(row) + "\n" for row in tokens_of(part, base))
        (root / f"{name}-tokens.jsonl").write_text(text, encoding="utf-8")
    return {
        "root": str(root),
        "base": str(base),
        "trials": arguments.trials,
        "examples": arguments.examples,
        "eval_every": arguments.examples // 4,
    }


def tokens_of(rows: list[dict[str, str]], base: Path) -> list[dict[str, list[int]]]:
    """What this package makes of the rows, in TRL's columns; without rows that have no label."""
    from transformers import AutoTokenizer

    from raytune_ft.config.data import SourceConfig
    from raytune_ft.data.formats import Encoder, Example, encode_rows
    from raytune_ft.data.rows import Row

    encoder = Encoder.of(AutoTokenizer.from_pretrained(base))
    texts = [Row(str(number), row) for number, row in enumerate(rows)]
    found = []
    for one in encode_rows(encoder, SourceConfig(path="rows.jsonl"), "", texts):
        assert isinstance(one, Example)
        ids, mask = one.ids[:MAX_LENGTH], one.mask[:MAX_LENGTH]
        if mask.any():
            labels = [int(token) if own else -100 for token, own in zip(ids, mask, strict=True)]
            found.append({"input_ids": ids.tolist(), "labels": labels})
    return found


def short_rows(shared: Path) -> list[dict[str, str]]:
    """The calculator steps inside GSM8K's answers: `<<48/2=24>>`."""
    steps: dict[str, str] = {}
    for row in _gsm8k(shared):
        steps.update(STEP.findall(row["answer"]))
    return [{"prompt": prompt, "completion": steps[prompt]} for prompt in steps]


def whole_rows(shared: Path) -> list[dict[str, str]]:
    """Problems and their worked answers."""
    return [{"prompt": r["question"] + "\n", "completion": r["answer"]} for r in _gsm8k(shared)]


def _gsm8k(shared: Path) -> list[dict[str, str]]:
    lines = (shared / "data/gsm8k/train.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def measure(job: dict[str, Any], arm: str, number: int) -> dict[str, float]:
    """One sweep in a process of its own."""
    environment = os.environ | {"RAY_USAGE_STATS_ENABLED": "0", "TOKENIZERS_PARALLELISM": "false"}
    command, result = (theirs if arm in "ABE" else ours)(job, arm, number)
    started = time.perf_counter()
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    seconds = time.perf_counter() - started
    if done.returncode:
        raise SystemExit(f"arm {arm} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return {"seconds": round(seconds, 1), "best": best_of(json.loads(result.read_text()))}


def best_of(result: dict[str, Any]) -> float:
    """The lowest evaluation loss of a sweep."""
    return float(result["best"]["eval_loss"])


def ours(job: dict[str, Any], arm: str, number: int) -> tuple[list[str], Path]:
    """The command of a user, and the file that holds its result."""
    name = f"{arm}-{number}"
    source = {"prompt": "prompt", "completion": "completion"}
    scheduler = {"grace_examples": job["eval_every"], "reduction_factor": ASHA_FACTOR}
    config = {
        "name": name,
        "seed": number,
        "storage": f"{job['root']}/runs",
        "model": {"path": job["base"]},
        "method": {"name": "lora", "rank": 8, "alpha": 16.0},
        "data": {
            "train": {"path": f"{job['root']}/train.jsonl", **source},
            "validation": {"path": f"{job['root']}/validation.jsonl", **source},
            "separator": "",
            "max_length": MAX_LENGTH,
            "max_bad_fraction": 0.1,  # some questions alone are longer
        },
        "train": {
            "precision": "float32",
            "max_examples": job["examples"],
            "eval_every_examples": job["eval_every"],
        },
        "checkpoint": {"every_examples": 10**9},
        "search": {
            "trials": job["trials"],
            "execution": EXECUTION[arm],
            "scheduler": scheduler if arm in "FGH" else None,
            "defaults": False,
            "space": {
                "train.lr": {"log_uniform": list(LR)},
                "train.batch_size": {"choice": list(BATCH)},
                "method.rank": {"choice": list(RANKS)},
            },
        },
    }
    path = Path(job["root"]) / f"{name}.yaml"
    path.write_text(json.dumps(config), encoding="utf-8")  # which YAML reads as well
    command = [sys.executable, "-m", "raytune_ft", "sweep", str(path)]
    return command, Path(job["root"]) / "runs" / name / "result.json"


def theirs(job: dict[str, Any], arm: str, number: int) -> tuple[list[str], Path]:
    """This file again, in a process of its own."""
    result = Path(job["root"]) / f"{arm}-{number}.json"
    own = {**job, "arm": arm, "seed": number, "result": str(result)}
    return [sys.executable, __file__, "--run", json.dumps(own)], result


def run_tune(job: dict[str, Any]) -> None:
    """Arms A, B and E."""
    import optuna
    import ray
    from ray import tune
    from ray.tune.schedulers import ASHAScheduler
    from ray.tune.search.optuna import OptunaSearch

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    ray.init(address="local", include_dashboard=False, log_to_driver=False)
    scheduler = ASHAScheduler(
        time_attr="examples",
        max_t=job["examples"],
        grace_period=job["eval_every"],
        reduction_factor=ASHA_FACTOR,
    )
    space = {
        "lr": tune.loguniform(*LR),
        "batch_size": tune.choice(BATCH),
        "rank": tune.choice(RANKS),
    }
    trainable = _reused_trial() if job["arm"] == "B" else _trial
    tuner = tune.Tuner(
        tune.with_resources(tune.with_parameters(trainable, job=job), {"cpu": 1}),
        param_space=space,
        tune_config=tune.TuneConfig(
            metric="eval_loss",
            mode="min",
            num_samples=job["trials"],
            max_concurrent_trials=os.cpu_count(),
            search_alg=OptunaSearch(seed=job["seed"]),
            scheduler=scheduler if job["arm"] == "E" else None,
            reuse_actors=job["arm"] == "B",
        ),
        run_config=tune.RunConfig(
            storage_path=f"{job['root']}/tune",
            verbose=0,
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),  # B's class has none
        ),
    )
    results = tuner.fit()
    if results.errors:
        raise SystemExit(str(results.errors[0]))
    best = min(float(each.metrics_dataframe["eval_loss"].min()) for each in results)
    Path(job["result"]).write_text(json.dumps({"best": {"eval_loss": best}}), encoding="utf-8")
    ray.shutdown()


def _trial(config: dict[str, Any], job: dict[str, Any]) -> None:
    from ray import tune

    _train(config, job, _rows(job), tune.report)


def _reused_trial() -> Any:
    """A class, whose process is kept for the next trial, and its rows with it."""
    import queue
    import threading

    from ray import tune

    class Reused(tune.Trainable):
        def setup(self, config: dict[str, Any], job: dict[str, Any]) -> None:
            self._job, self._rows = job, _rows(job)
            self.reset_config(config)

        def reset_config(self, config: dict[str, Any]) -> bool:
            self._reports: queue.Queue[dict[str, float] | BaseException] = queue.Queue()
            threading.Thread(target=self._run, args=(config,), daemon=True).start()
            return True

        def _run(self, config: dict[str, Any]) -> None:
            try:
                self._rows = _train(config, self._job, self._rows, self._reports.put)
            except BaseException as error:  # noqa: BLE001 - raised in `step`
                self._reports.put(error)

        def step(self) -> dict[str, Any]:
            report = self._reports.get()
            if isinstance(report, BaseException):
                raise report
            return {**report, "done": report["examples"] >= self._job["examples"]}

    return Reused


def _rows(job: dict[str, Any]) -> tuple[Any, Any]:
    from datasets import Dataset

    return tuple(
        Dataset.from_json(f"{job['root']}/{name}-tokens.jsonl") for name in ("train", "validation")
    )


def _train(
    config: dict[str, Any], job: dict[str, Any], rows: tuple[Any, Any], report: Any
) -> tuple[Any, Any]:
    """One trial with TRL; returns its rows as it has prepared them."""
    import torch
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    class Report(TrainerCallback):
        def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any, **_: Any) -> None:
            examples = state.global_step * config["batch_size"]
            report({"eval_loss": metrics["eval_loss"], "examples": examples})

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        settings = SFTConfig(
            output_dir=folder,
            per_device_train_batch_size=config["batch_size"],
            per_device_eval_batch_size=128,  # all in one: a mean over tokens, not over batches
            max_steps=job["examples"] // config["batch_size"],
            learning_rate=config["lr"],
            lr_scheduler_type="cosine",
            eval_strategy="steps",
            eval_steps=job["eval_every"] // config["batch_size"],
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            dataloader_pin_memory=False,
            max_length=MAX_LENGTH,
            seed=job["seed"],
        )
        trainer = SFTTrainer(
            AutoModelForCausalLM.from_pretrained(job["base"], dtype=torch.float32),
            settings,
            train_dataset=rows[0],
            eval_dataset=rows[1],
            processing_class=AutoTokenizer.from_pretrained(job["base"]),
            peft_config=LoraConfig(
                r=config["rank"],
                lora_alpha=16,
                target_modules="all-linear",
                task_type="CAUSAL_LM",
            ),
            callbacks=[Report()],
        )
        trainer.train()
        return trainer.train_dataset, trainer.eval_dataset


if __name__ == "__main__":
    main()
