"""Rules that models with a head are compared with, and the heads of model directories."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from raytune_ft.config.objectives import Figure
from raytune_ft.config.schema import ModelConfig
from raytune_ft.data.formats.classification import TARGET
from raytune_ft.data.split import TokenizedSplit
from raytune_ft.errors import ModelError
from raytune_ft.evaluate.columns import figures_of
from raytune_ft.evaluate.scores import Scores
from raytune_ft.model.heads import Head
from raytune_ft.model.load import load_model_config, written_head
from raytune_ft.model.objectives.base import example_weights
from raytune_ft.model.objectives.classification import Classification
from raytune_ft.model.objectives.reward import Reward


def constant_scores(
    train: TokenizedSplit,
    split: TokenizedSplit,
    objective: Classification,
    figures: tuple[Figure, ...],
) -> dict[str, Scores]:
    """Scores of always giving the answer whose loss on the training set is the smallest.

    Its confidence in a label is the weighted share of examples that have it; its numbers are the
    weighted means. Of labels with the same share it gives the more frequent one. With several
    labels an example, one more example with each and one without are counted, so that no share is
    0 or 1.
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
    return scores_of(torch.from_numpy(answer_L).repeat(len(split), 1), split, objective, figures)


def length_scores(
    train: TokenizedSplit, split: TokenizedSplit, objective: Reward, figures: tuple[Figure, ...]
) -> dict[str, Scores]:
    """Scores of the rule that the longer answer of a pair is the better one, or the shorter one,
    whichever was chosen more often in training pairs.

    Its margin is the same for all pairs: the logit of the share of training pairs, with one more
    each way, in which the longer answer was chosen. Of answers of one length it prefers none.
    """
    sign_N, sign_E = (np.sign(_longer(one)) for one in (train, split))
    right, wrong = int((sign_N > 0).sum()) + 1, int((sign_N < 0).sum()) + 1
    half_E = torch.from_numpy(sign_E * np.log(right / wrong) / 2)
    return _scored(objective, (half_E, -half_E), figures, split)


def _longer(split: TokenizedSplit) -> npt.NDArray[np.int64]:
    """`[n]`, by how many tokens the chosen answer is the longer one."""
    chosen_n, rejected_n = np.diff(split.part_labels).reshape(-1, 2).T
    longer_n: npt.NDArray[np.int64] = chosen_n - rejected_n
    return longer_n


def scores_of(
    outputs_EL: Tensor,
    split: TokenizedSplit,
    objective: Classification,
    figures: tuple[Figure, ...],
) -> dict[str, Scores]:
    """Figures of given outputs for the examples of a split."""
    return _scored(objective, (outputs_EL,), figures, split)


def _scored(
    objective: Any, outputs: tuple[Tensor, ...], figures: tuple[Figure, ...], split: TokenizedSplit
) -> dict[str, Scores]:
    """`outputs`: what `objective.columns_of` takes before the data columns."""
    data = {name: torch.from_numpy(np.array(values)) for name, values in split.columns.items()}
    made = objective.columns_of(*outputs, data)
    columns = {name: values.numpy() for name, values in made.items()}
    known = objective.known(split, np.arange(len(split)))
    return figures_of(columns | known, figures, split)


def check_head(model: ModelConfig, head: Head) -> None:
    """
    Raises:
        ModelError: a directory is no model, has no such head, or one for other labels.
    """
    load_model_config(model, head)
    written = written_head(model)
    if written is None:
        raise ModelError(
            f"MODEL_DIR={model.path}", "has no classification head", "write one that training made"
        )
    if head.rows_in(written) is None:
        theirs, ours = (", ".join(labels[:12]) for labels in (written.labels, head.labels))
        raise ModelError(
            f"MODEL_DIR={model.path}",
            f"has the labels {theirs}, and the data {ours}",
            "write data.labels as the model has them",
        )
