"""The metrics of `promote.metrics`: each is one function of a `Subject`, declared with its figures
in `config.metrics`.
"""

from __future__ import annotations

import logging
import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from raytune_ft.config.metrics import HARNESS, METRICS, REWARD, measured_rewards, of_reward
from raytune_ft.config.objectives import LOSS, Mode
from raytune_ft.config.objectives import REWARD as OF_SAID
from raytune_ft.config.rewards import expanded, function_of
from raytune_ft.config.schema import Config
from raytune_ft.data.formats.classification import TARGET
from raytune_ft.data.formats.example import DESIRABLE
from raytune_ft.data.split import TokenizedSplit
from raytune_ft.errors import ConfigError, DataError, RunFailed
from raytune_ft.evaluate.answers import known_means
from raytune_ft.evaluate.classifier import scores_of
from raytune_ft.evaluate.columns import columns_of, figures_of
from raytune_ft.evaluate.context import Subject
from raytune_ft.evaluate.scores import Scores
from raytune_ft.model.objectives import TokenObjective
from raytune_ft.model.objectives.classification import Classification
from raytune_ft.rewards.functions import check_function, load_function
from raytune_ft.rewards.pool import check_rewards

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


def check_metrics(config: Config) -> None:
    """Check the files that `promote.metrics` and its rewards name, and that the variables of the
    environment which these name are set. A function of a file is not run.

    Raises:
        InputError: a file cannot be read, or has no such function; a variable is not set.
    """
    for name in config.promote.metrics:
        if function_of(name):
            check_function(name, "promote.metrics")
    check_rewards(expanded(measured_rewards(config)))


MAX_LABELS = 100

Metric = Callable[[Subject], dict[str, Scores]]


def own(subject: Subject) -> dict[str, Scores]:
    """The figures that the objective of the run declares, from teacher-forced outputs; of one that
    learns from what the model says those of `reward`, and minus the reward as loss.
    """
    if OF_SAID in subject.figures:
        found = reward_scores(subject)
        if REWARD not in found:  # of judges that compare, which `evaluate.duel` asks
            return found
        loss = Scores.known_mean(-known_means(subject.answers.total_PC), "min")
        return {LOSS.promoted: loss} | found
    columns = columns_of(subject.runner, subject.objective, subject.split)
    return figures_of(columns, subject.figures, subject.split)


def answer(subject: Subject) -> dict[str, Scores]:
    """Whether the answer in the continuation is the one in the reference.

    A reference without an answer, such as one that was cut short, never matches.
    """
    pattern = re.compile(subject.settings.answer)
    texts = subject.continuations
    wanted = [extracted(pattern, text.reference) for text in texts]
    if not any(wanted):
        raise DataError(
            f"promote.answer={subject.settings.answer}",
            f"finds no answer in any of {len(texts):,} references",
            "write a pattern that does, or take answer out of promote.metrics",
        )
    hits = [
        want is not None and want == extracted(pattern, text.generated)
        for want, text in zip(wanted, texts, strict=True)
    ]
    return {"answer_exact_match": _mean(subject, [float(hit) for hit in hits])}


def _mean(subject: Subject, values: Sequence[float]) -> Scores:
    """The mean of a comparison with the reference, over examples whose reference is an answer to
    give: one that `format: unpaired` calls undesirable is not.
    """
    values_n = np.asarray(values, np.float64)
    if DESIRABLE in subject.split.columns:
        values_n = np.where(subject.split.columns[DESIRABLE][:, 0] > 0, values_n, np.nan)
    return Scores.known_mean(values_n)


def extracted(pattern: re.Pattern[str], text: str) -> str | None:
    """The first match of the pattern's group, in lower case and without thousands separators and a
    full stop at the end; None where nothing matches.
    """
    found = pattern.search(text)
    if found is None:
        return None
    return re.sub(r"(?<=\d),(?=\d{3})", "", found[1].strip()).rstrip(".").casefold()


def rouge(subject: Subject) -> dict[str, Scores]:
    """F-measures of Google's rouge-score, with stemming, the mean over examples."""
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise ConfigError(
            "promote.metrics=rouge",
            "needs the package rouge-score, which is not installed",
            "pip install rouge-score, or 'raytune-ft[metrics]'",
        ) from error
    names = [figure.name for figure in METRICS["rouge"].figures]
    scorer = RougeScorer(names, use_stemmer=True)
    found = [scorer.score(text.reference, text.generated) for text in subject.continuations]
    return {name: _mean(subject, [one[name].fmeasure for one in found]) for name in names}


def classification(subject: Subject) -> dict[str, Scores]:
    """The likeliest of the completions of train as the label of a prompt.

    A completion is scored by its whole log-probability, end token included, and the softmax over
    completions is the confidence. A reference that is no completion of train is a label of its
    own, which is never guessed.
    """
    labels = _labels(subject.train)
    prompts = [subject.prompt(i) for i in range(len(subject.split))]
    rows = [
        (np.array([*prompt.ids, *label], np.int32), np.arange(len(prompt.ids) + len(label)))
        for prompt in prompts
        for label in labels
    ]
    starts = [len(prompt.ids) for prompt in prompts for _ in labels]
    split = TokenizedSplit.from_examples(
        [(ids, places >= start) for (ids, places), start in zip(rows, starts, strict=True)]
    )
    losses = columns_of(subject.runner, TokenObjective(), split)["loss"].reshape(-1, len(labels))
    outputs_NL = np.pad(-losses, ((0, 0), (0, 1)), constant_values=-np.inf)
    number = {label: i for i, label in enumerate(labels)}
    wanted = [number.get(prompt.reference, len(labels)) for prompt in prompts]
    target_NL = np.eye(len(labels) + 1, dtype=np.float32)[wanted]
    asked = replace(subject.split, columns={TARGET: target_NL})
    objective = Classification("single_label", (1.0,) * (len(labels) + 1))
    return scores_of(
        torch.from_numpy(outputs_NL), asked, objective, METRICS["classification"].figures
    )


def custom(name: str, subject: Subject) -> dict[str, Scores]:
    """The user's own function of prompt, reference and continuation.

    Raises:
        RunFailed: it raised, or gave something that is not a finite number.
    """
    function = load_function(name, "promote.metrics")
    key = name.rpartition(":")[2]
    values = []
    for text in subject.continuations:
        try:
            value = float(function(text.prompt, text.reference, text.generated))
        except Exception as error:  # it is code of the user
            raise RunFailed(f"{name} failed: {type(error).__name__}: {error}") from error
        if not math.isfinite(value):
            raise RunFailed(f"{name} gave {value}, which is not a finite number")
        values.append(value)
    return {key: _mean(subject, values)}


def reward_scores(subject: Subject) -> dict[str, Scores]:
    """What rewards say of sampled completions: `reward`, the weighted sum, `reward:NAME` of each,
    `completion_tokens`, `truncated` and `unscored`. One value for each prompt.
    """
    return subject.answers.figures()


def one_reward(name: str, subject: Subject) -> dict[str, Scores]:
    """`reward:NAME`. A win rate needs the answers of the base too, and is computed beside them."""
    kind, _ = of_reward(name) or (name, "")
    answers = subject.answers
    return {name: answers.figures()[name]} if kind == REWARD else {}


def metric_named(name: str) -> Metric:
    """The function behind an entry of `promote.metrics`."""
    if name in METRICS:
        return METRICS[name].implementation()
    if of_reward(name) is not None:
        return partial(one_reward, name)
    if name.startswith(HARNESS):
        return partial(harness, name.removeprefix(HARNESS))
    return partial(custom, name)


def _labels(train: TokenizedSplit) -> list[tuple[int, ...]]:
    """The different completions of train. Raises DataError where there are too many."""
    found: dict[tuple[int, ...], None] = {}
    for i in range(len(train)):
        ids, mask = train.example(i)
        found.setdefault(tuple(ids[mask].tolist()))
        if len(found) > MAX_LABELS:
            raise DataError(
                "promote.metrics=classification",
                f"needs few labels, and data.train has over {MAX_LABELS} different completions",
                "write loss, answer or rouge",
            )
    return list(found)
