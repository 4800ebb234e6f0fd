"""The metrics: each is one function of a measured model, and one entry of `METRICS`."""

from __future__ import annotations

import ast
import math
import re
import runpy
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from raytune_ft.config.metrics import FIGURES, HARNESS, function_of
from raytune_ft.data.split import TokenizedSplit
from raytune_ft.errors import ConfigError, DataError, RunFailed
from raytune_ft.evaluate.context import Subject
from raytune_ft.evaluate.lm_eval import harness
from raytune_ft.evaluate.scores import Column, Scores, by_source, calibration_error, ratio
from raytune_ft.evaluate.token_scores import forced

Score = Callable[[str, str, str], float]
"""prompt, reference, generated -> a number, more is better."""


def check_functions(metrics: Sequence[str]) -> None:
    """Whether each file has its function, without running any of it.

    Raises:
        ConfigError: the file cannot be read, is no Python, or has no such function.
    """
    for name in metrics:
        found = function_of(name)
        if found is None:
            continue
        path, function = Path(found[0]), found[1]
        value = f"promote.metrics={name}"
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (OSError, SyntaxError, ValueError) as error:
            reason = getattr(error, "strerror", None) or "it is no Python"
            raise ConfigError(
                value, f"names a file that cannot be read ({reason})", "write FILE.py:FUNCTION"
            ) from None
        names = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
        if function not in names:
            raise ConfigError(
                value,
                f"names no function of {path.name}, which has {', '.join(names) or 'none'}",
                "write one of them, or def it there",
            )


def load_function(name: str) -> Score:
    """Run the file and take the function.

    Raises:
        ConfigError: see `check_functions`.
    """
    check_functions([name])
    found = function_of(name)
    assert found is not None
    score: Score = runpy.run_path(found[0])[found[1]]
    return score


LARGEST_EXPONENT = 700.0
MAX_LABELS = 100

Metric = Callable[[Subject], dict[str, Scores]]


def loss(subject: Subject) -> dict[str, Scores]:
    """Loss per label token, its exponential, and what greedy decoding would reproduce.

    Greedy decoding picks the first label token, so sees the reference before the second, and so
    on: it reproduces a whole completion where every single token of it is the likeliest.
    """
    seen = subject.forced
    return {
        "eval_loss": Scores((seen.losses, seen.tokens), "min"),
        "perplexity": Scores((seen.losses, seen.tokens), "min", _perplexity),
        "token_accuracy": Scores((seen.right, seen.tokens)),
        "exact_match": Scores.mean((seen.right == seen.tokens).astype(float).tolist()),
    } | by_source(seen.losses, seen.tokens, subject.split)


def answer(subject: Subject) -> dict[str, Scores]:
    """Whether the answer in the continuation is the one in the reference.

    A reference without an answer, such as one that was cut short, is matched by nothing.
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
    return {"answer_exact_match": Scores.mean([float(hit) for hit in hits])}


def extracted(pattern: re.Pattern[str], text: str) -> str | None:
    """What the pattern's group finds first, without case, thousands separators and a full stop."""
    found = pattern.search(text)
    if found is None:
        return None
    return re.sub(r"(?<=\d),(?=\d{3})", "", found[1].strip()).rstrip(".").casefold()


def rouge(subject: Subject) -> dict[str, Scores]:
    """F-measures of Google's rouge-score, with stemming, the mean over examples."""
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise _absent("rouge", "rouge-score") from error
    scorer = RougeScorer(list(FIGURES["rouge"]), use_stemmer=True)
    found = [scorer.score(text.reference, text.generated) for text in subject.continuations]
    return {name: Scores.mean([one[name].fmeasure for one in found]) for name in FIGURES["rouge"]}


def classification(subject: Subject) -> dict[str, Scores]:
    """The likeliest of the completions of train as the label of a prompt.

    Every label is scored by its whole log-probability, end token included; the softmax over
    labels is the confidence, of which `calibration_error` is the expected calibration error over
    ten bins (Guo et al., 2017).
    """
    from scipy.special import softmax

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
    chances_NL = softmax(-forced(subject.engine, split).losses.reshape(-1, len(labels)), axis=1)
    number = {label: i for i, label in enumerate(labels)}
    wanted = np.array([number.get(prompt.reference, -1) for prompt in prompts], np.float64)
    guessed = chances_NL.argmax(1).astype(np.float64)
    return {
        "accuracy": Scores.mean((wanted == guessed).astype(float).tolist()),
        "macro_f1": Scores((guessed, wanted), "max", _macro_f1),
        "calibration_error": Scores(
            (chances_NL.max(1), (wanted == guessed).astype(np.float64)), "min", calibration_error
        ),
    }


def custom(name: str, subject: Subject) -> dict[str, Scores]:
    """The user's own function of prompt, reference and continuation."""
    function = load_function(name)
    key = name.rpartition(":")[2]
    values = []
    for text in subject.continuations:
        try:
            value = float(function(text.prompt, text.reference, text.generated))
        except Exception as error:  # anything may go wrong in there
            raise RunFailed(f"{name} failed: {type(error).__name__}: {error}") from error
        if not math.isfinite(value):
            raise RunFailed(f"{name} gave {value}, which is no score")
        values.append(value)
    return {key: Scores.mean(values)}


METRICS: dict[str, Metric] = {
    "loss": loss,
    "answer": answer,
    "rouge": rouge,
    "classification": classification,
}


def metric_named(name: str) -> Metric:
    """The function behind an entry of `promote.metrics`."""
    if name in METRICS:
        return METRICS[name]
    if name.startswith(HARNESS):
        return partial(harness, name.removeprefix(HARNESS))
    return partial(custom, name)


def _perplexity(losses: Column, tokens: Column) -> float:
    return math.exp(min(ratio(losses, tokens), LARGEST_EXPONENT))


def _macro_f1(guessed: Column, wanted: Column) -> float:
    """Over the labels that occur; a reference that is no label counts as a class of its own."""
    try:
        from sklearn.metrics import f1_score
    except ImportError as error:
        raise _absent("classification", "scikit-learn") from error
    return float(f1_score(wanted, guessed, average="macro", zero_division=0.0))


def _labels(train: TokenizedSplit) -> list[tuple[int, ...]]:
    """The different completions of train."""
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


def _absent(metric: str, package: str) -> ConfigError:
    return ConfigError(
        f"promote.metrics={metric}",
        f"needs the package {package}, which is not installed",
        f"pip install {package}, or 'raytune-ft[metrics]'",
    )
