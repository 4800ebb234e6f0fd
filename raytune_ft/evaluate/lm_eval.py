"""Tasks of EleutherAI's lm-evaluation-harness: one of its own, or a local YAML file."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raytune_ft.config.objectives import Mode
from raytune_ft.errors import ConfigError, RunFailed
from raytune_ft.evaluate.scores import Scores

if TYPE_CHECKING:
    from raytune_ft.evaluate.context import Subject

BATCH = 16
FEWSHOT_SEED = 1234  # the harness' own default
_TASK = re.compile(r"""^task:\s*["']?([^\s"'#]+)""", re.M)


def harness(task: str, subject: Subject) -> dict[str, Scores]:
    """Every metric of the task that is the mean of a number for each document, as "task/metric".

    A task of a YAML file needs no network to be found; a task of the harness may download its data.

    Raises:
        ConfigError: the harness is not installed, or has no such task.
        RunFailed: the task failed, or has no such metric.
    """
    try:
        from lm_eval.evaluator import evaluate
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise ConfigError(
            f"promote.metrics=lm_eval:{task}",
            "needs lm-evaluation-harness, which is not installed",
            "pip install 'raytune-ft[lm-eval]'",
        ) from error
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    name, manager = _find(task)
    model: Any = subject.runner.model
    with _quiet():
        try:
            found = evaluate(
                lm=HFLM(pretrained=model, tokenizer=subject.tokenizer, batch_size=BATCH),
                task_dict=_loaded(manager, name),
                log_samples=True,
                bootstrap_iters=0,
                apply_chat_template=subject.is_chat,
            )
        except Exception as error:  # tasks run code of others
            raise RunFailed(f"lm_eval:{task} failed: {type(error).__name__}: {error}") from error
    scores = {
        figure: score
        for leaf, samples in found["samples"].items()
        for figure, score in _scores(leaf, samples, found["higher_is_better"].get(leaf, {})).items()
    }
    if not scores:
        raise RunFailed(f"lm_eval:{task} has no metric with one number for each document")
    return scores


def _find(task: str) -> tuple[str, Any]:
    """The task's name, and a task manager that has it. Raises ConfigError."""
    from lm_eval.tasks import TaskManager

    path, value = Path(task), f"promote.metrics=lm_eval:{task}"
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise ConfigError(value, "names a file that does not exist", "write a task's YAML file")
        # Read as text: a YAML parser would have to know the harness' tags, such as !function.
        written = _TASK.search(path.read_text(encoding="utf-8"))
        name = written[1] if written else ""
        manager = TaskManager(include_path=str(path.parent), include_defaults=False)
    else:
        name, manager = task, TaskManager()
    if name not in manager.all_tasks:
        raise ConfigError(value, "is not a task of the harness", "write one of `lm-eval ls tasks`")
    return name, manager


def _loaded(manager: Any, name: str) -> Any:
    """Tasks set up as by the harness' own command line."""
    loaded = manager.load([name])
    for task in loaded["tasks"].values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=FEWSHOT_SEED)
    return loaded


def _scores(task: str, samples: list[dict[str, Any]], better: dict[str, bool]) -> dict[str, Scores]:
    """Scores by metric, in the order of the documents; of several filters the first counts."""
    samples = [one for one in samples if one["filter"] == samples[0]["filter"]]
    samples.sort(key=lambda one: one["doc_id"])
    scores = {}
    for metric in samples[0]["metrics"] if samples else ():
        values = [one[metric] for one in samples]
        if all(isinstance(value, int | float) for value in values):
            mode: Mode = "max" if better.get(metric, True) else "min"
            scores[f"{task}/{metric}"] = Scores.mean([float(value) for value in values], mode)
    return scores


@contextmanager
def _quiet() -> Iterator[None]:
    """Inside, stderr is dropped: the harness writes progress bars and warnings there."""
    with Path(os.devnull).open("w") as nowhere, redirect_stderr(nowhere):
        yield
