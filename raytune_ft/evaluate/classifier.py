"""What a task head scores: figures of outputs for whole examples, and those of no model at all."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig

from raytune_ft.config.schema import ModelConfig
from raytune_ft.data.formats.classification import TARGET
from raytune_ft.data.split import TokenizedSplit
from raytune_ft.errors import ModelError
from raytune_ft.evaluate.scores import Column, Scores, by_source, calibration_error
from raytune_ft.evaluate.token_scores import batches
from raytune_ft.model.heads import PROBLEM_TYPES, Head
from raytune_ft.model.load import load_model_config, resolve_model_path
from raytune_ft.model.objectives.base import example_weights
from raytune_ft.model.objectives.classification import (
    Classification,
    class_weights,
    guessed,
    macro_f1,
)
from raytune_ft.train.engine import Engine


def classification(
    head: Head, written: str | dict[str, float], train: TokenizedSplit
) -> Classification:
    """What a head is measured by; `written` is `train.class_weights`."""
    weights = class_weights(written, head.problem, head.labels, train)
    return Classification(head.problem, weights)


def head_scores(
    engine: Engine, split: TokenizedSplit, objective: Classification
) -> dict[str, Scores]:
    """Of a model, read as transformers reads it: every example in a row of its own."""
    return scores_of(_outputs(engine, split, len(objective.class_weights)), split, objective)


def constant_scores(
    train: TokenizedSplit, split: TokenizedSplit, objective: Classification
) -> dict[str, Scores]:
    """Of always giving the same answer: the one whose loss on the training set is the smallest.

    Its confidence in a label is the weighted share of examples that have it, its numbers are the
    weighted means. Of labels that it holds for equal it says the more frequent one. Of several
    labels, one more example with each and one without are counted, so that no share is 1.
    """
    target_NL = train.columns[TARGET].astype(np.float64)
    weights = example_weights(train.columns)
    weights_N = np.ones(len(train)) if weights is None else weights.astype(np.float64)
    sum_L, total = weights_N @ target_NL, weights_N.sum()
    if objective.problem == "regression":
        answer_L = sum_L / total
    elif objective.problem == "single_label":
        sum_L *= np.array(objective.class_weights)
        share_L = np.maximum(sum_L / sum_L.sum(), np.finfo(np.float64).tiny)
        answer_L = np.log(share_L) + 1e-9 * target_NL.mean(0)
    else:
        share_L = (sum_L + 1) / (total + 2)
        answer_L = np.log(share_L / (1 - share_L))
    return scores_of(torch.from_numpy(answer_L).repeat(len(split), 1), split, objective)


def scores_of(
    outputs_EL: Tensor, split: TokenizedSplit, objective: Classification
) -> dict[str, Scores]:
    """The figures of `config.metrics.OF_A_HEAD`, and the loss of each source.

    The loss is that of training, without smoothing; the other figures count all examples alike.
    """
    outputs_EL = outputs_EL.double()
    target_EL = torch.from_numpy(split.columns[TARGET].astype(np.float64))
    weights = objective.weights(split.columns, np.ones_like).astype(np.float64)
    losses = weights * objective.unweighted(outputs_EL, target_EL).numpy()
    figures = _of_numbers if objective.problem == "regression" else _of_labels
    return {
        "eval_loss": Scores((losses, weights), "min"),
        **figures(outputs_EL, target_EL, objective.problem),
        **by_source(losses, weights, split),
    }


def _of_labels(outputs_EL: Tensor, target_EL: Tensor, problem: str) -> dict[str, Scores]:
    guess_EL = guessed(outputs_EL, problem)
    right = (guess_EL == target_EL).all(1).double().numpy()
    found = {"accuracy": Scores.mean(right)}
    if problem == "multi_label":
        return found | {"macro_f1": Scores((guess_EL.numpy(), target_EL.numpy()), "max", _f1)}
    classes = (each.argmax(1).double().numpy() for each in (guess_EL, target_EL))
    sure = outputs_EL.softmax(1).amax(1).numpy()
    return found | {
        "macro_f1": Scores(tuple(classes), "max", _f1_of_classes),
        "calibration_error": Scores((sure, right), "min", calibration_error),
    }


def _of_numbers(outputs_EL: Tensor, target_EL: Tensor, problem: str) -> dict[str, Scores]:
    columns = outputs_EL.numpy(), target_EL.numpy()
    return {
        "mse": Scores.mean((outputs_EL - target_EL).square().mean(1).numpy(), "min"),
        "r2": Scores(columns, "max", _r2),
        "pearson": Scores(columns, "max", _pearson),
    }


def _f1(guess_EL: Column, target_EL: Column) -> float:
    return macro_f1((guess_EL * target_EL).sum(0), guess_EL.sum(0), target_EL.sum(0))


def _f1_of_classes(guess_E: Column, target_E: Column) -> float:
    count = int(max(guess_E.max(), target_E.max())) + 1

    def counts_L(classes_E: Column) -> Column:
        return np.bincount(classes_E.astype(int), minlength=count).astype(np.float64)

    hits_L = counts_L(target_E[guess_E == target_E])
    return macro_f1(hits_L, counts_L(guess_E), counts_L(target_E))


def _r2(output_EL: Column, target_EL: Column) -> float:
    """The mean over the numbers of an example; 0 for one that is always the same."""
    error, spread = ((output_EL - target_EL) ** 2).mean(0), target_EL.var(0)
    shares = np.divide(error, spread, out=np.ones_like(error), where=spread > 0)
    return float((1 - shares).mean())


def _pearson(output_EL: Column, target_EL: Column) -> float:
    """Likewise; 0 where either is always the same, which goes along with nothing."""
    output, target = output_EL - output_EL.mean(0), target_EL - target_EL.mean(0)
    spread = np.sqrt((output**2).mean(0) * (target**2).mean(0))
    shared = (output * target).mean(0)
    return float(np.divide(shared, spread, out=np.zeros_like(shared), where=spread > 0).mean())


@torch.no_grad()
def _outputs(engine: Engine, split: TokenizedSplit, labels: int) -> Tensor:
    """`[E, L]` of a split, in its order."""
    outputs_EL = torch.zeros(len(split), labels, dtype=torch.float64)
    for indices, batch in batches(engine, split):
        own = indices[[span.example for span in batch.spans]]
        outputs_EL[own] = engine.example_logits(batch).double().cpu()
    return outputs_EL


def check_head(model: ModelConfig, head: Head) -> None:
    """
    Raises:
        ModelError: a directory has no such head, or one for other labels.
    """
    load_model_config(model, head)  # is it there at all?
    written = written_head(model)
    if written is None:
        raise ModelError(
            f"MODEL_DIR={model.path}", "has no classification head", "write one that training made"
        )
    if head.problem != "regression" and written.labels != head.labels:
        theirs, ours = (", ".join(labels[:12]) for labels in (written.labels, head.labels))
        raise ModelError(
            f"MODEL_DIR={model.path}",
            f"tells {theirs} apart, and the data {ours}",
            "write data.labels as the model has them",
        )


def written_head(model: ModelConfig) -> Head | None:
    """What a directory's own config.json says of its head; None where it has none."""
    config = AutoConfig.from_pretrained(resolve_model_path(model.path))
    if not any("SequenceClassification" in name for name in config.architectures or ()):
        return None
    problems = {theirs: ours for ours, theirs in PROBLEM_TYPES.items()}
    usual = "regression" if config.num_labels == 1 else "single_label"
    labels = tuple(config.id2label[number] for number in sorted(config.id2label))
    return Head(problems.get(config.problem_type, usual), labels)
