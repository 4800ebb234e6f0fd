"""What is optimised: every objective with its facts and the figures of its evaluations.

An objective is one entry of `OBJECTIVES`; other packages may add theirs. Figures are declared here
and computed from the columns that `model.objectives.base.Objective.columns` gives. Nothing here
imports torch or numpy: formulas use the operators and methods of what they are given.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

Mode = Literal["min", "max"]
EVAL = "eval_"
LARGEST_EXPONENT = 700.0
"""Near the largest number whose exponential is a float64."""
ROUNDING = 1e-12
"""A variance below this share of the mean square is the rounding error of a constant."""


def ratio(top: Any, bottom: Any) -> float:
    """One sum over another, such as a loss per label token; NaN where the other is 0."""
    return float(top / bottom) if bottom else math.nan


def exponential(top: Any, bottom: Any) -> float:
    """The exponential of a ratio, such as the perplexity."""
    return math.exp(min(ratio(top, bottom), LARGEST_EXPONENT))


def mean_gap(one: Any, ones: Any, other: Any, others: Any) -> float:
    """The difference of two means."""
    return ratio(one, ones) - ratio(other, others)


def macro_f1(hits_L: Any, guesses_L: Any, wanted_L: Any) -> float:
    """Mean F1 of the labels that occur in guesses or references."""
    occurs_L = guesses_L + wanted_L > 0
    shares = 2 * hits_L[occurs_L] / (guesses_L + wanted_L)[occurs_L]
    return float(shares.mean()) if occurs_L.any() else 0.0


def binned_gap(gaps_b: Any, examples: Any) -> float:
    """Expected calibration error (Guo et al., 2017): `gaps_b` has confidence minus accuracy, summed
    over the examples of each bin.
    """
    return float(abs(gaps_b).sum() / examples)


def r2(examples: Any, y_L: Any, p_L: Any, yy_L: Any, pp_L: Any, yp_L: Any) -> float:
    """Mean over the numbers of an example, from the sums of y, p, y^2, p^2 and yp; 0 for a number
    that is the same in every example.
    """
    variance = _variance(y_L / examples, yy_L / examples)
    varies = variance > 0
    error = yy_L / examples - 2 * (yp_L / examples) + pp_L / examples
    unexplained = error / (variance + ~varies)
    return float(((1 - unexplained) * varies).mean())


def pearson(examples: Any, y_L: Any, p_L: Any, yy_L: Any, pp_L: Any, yp_L: Any) -> float:
    """Pearson's r, from the same sums as `r2`; 0 where y or p is the same in every example."""
    y, p, yy, pp, yp = (each / examples for each in (y_L, p_L, yy_L, pp_L, yp_L))
    spread = (_variance(y, yy) * _variance(p, pp)) ** 0.5
    varies = spread > 0
    return float(((yp - y * p) / (spread + ~varies) * varies).mean())


def _variance(mean: Any, mean_square: Any) -> Any:
    found = mean_square - mean * mean
    return found * (found > ROUNDING * mean_square)


@dataclass(frozen=True)
class Figure:
    """One number of an evaluation: a formula of sums over examples.

    Training adds the columns up over examples, micro-batches and ranks; promotion adds them up over
    the examples of each bootstrap draw.

    Attributes:
        name: its key in metrics.jsonl and in `search.metric`, which begins with `eval_`; of a
            figure that only promotion measures any name.
        mode: which way is better.
        columns: names of per-example columns; () where a metric of `promote.metrics` computes the
            value of each example itself.
        formula: from the sum of each column, in that order, to the value. A sum is a number, or an
            array [L] of a column [examples, L].
        label: words for tables; the name without `_` where there are none.
        trained: whether evaluations during training have it, so that a search may follow it.
        problems: the values of `data.problem` that have it; () is all of them.
        measured: whether promotion and `evaluate` have it.
        neutral: neither way is better in itself, so that no search goes by it.
    """

    name: str
    mode: Mode
    columns: tuple[str, ...] = ()
    formula: Callable[..., float] = ratio
    label: str = ""
    trained: bool = True
    problems: tuple[str, ...] = ()
    measured: bool = True
    neutral: bool = False

    @property
    def promoted(self) -> str:
        """Its name in promotion and in `evaluate`, where only the loss keeps its `eval_`."""
        return self.name if self.name == LOSS.name else self.name.removeprefix(EVAL)

    def of(self, sums: Mapping[str, Any]) -> float:
        """Its value from sums of columns by name."""
        return self.formula(*(sums[name] for name in self.columns))


LOSS = Figure("eval_loss", "min", ("loss", "counted"), label="loss")
PERPLEXITY = Figure("eval_perplexity", "min", ("loss", "counted"), exponential)
TOKEN_ACCURACY = Figure("eval_token_accuracy", "max", ("right", "tokens"))
EXACT_MATCH = Figure("eval_exact_match", "max", ("exact", "examples"))
ACCURACY = Figure(
    "eval_accuracy", "max", ("right", "examples"), problems=("single_label", "multi_label")
)
MACRO_F1 = Figure(
    "eval_macro_f1",
    "max",
    ("hits", "guesses", "wanted"),
    macro_f1,
    "macro F1",
    problems=("single_label", "multi_label"),
)
CALIBRATION_ERROR = Figure(
    "eval_calibration_error",
    "min",
    ("gaps", "examples"),
    binned_gap,
    "expected calibration error",
    problems=("single_label",),
)
MOMENTS = ("examples", "target", "output", "target_squared", "output_squared", "product")
MSE = Figure(
    "eval_mse",
    "min",
    ("squared_error", "examples"),
    label="mean squared error",
    problems=("regression",),
)
R2 = Figure("eval_r2", "max", MOMENTS, r2, "R2", problems=("regression",))
PEARSON = Figure("eval_pearson", "max", MOMENTS, pearson, "Pearson's r", problems=("regression",))

REWARD_ACCURACY = Figure("eval_reward_accuracy", "max", ("preferred", "examples"))
REWARD_MARGIN = Figure("eval_reward_margin", "max", ("margin", "examples"))
PAIR_FIGURES = (
    LOSS,
    REWARD_ACCURACY,
    REWARD_MARGIN,
    Figure("eval_chosen_logps", "max", ("chosen_logps", "examples")),
    Figure("eval_rejected_logps", "min", ("rejected_logps", "examples")),
)

TOKEN_FIGURES = (
    LOSS,
    replace(PERPLEXITY, trained=False),
    TOKEN_ACCURACY,
    EXACT_MATCH,
)
COMPLETIONS = ("prompt_completion", "messages", "sharegpt", "alpaca", "text", "auto")


@dataclass(frozen=True)
class ObjectiveFacts:
    """What the config, the data and the evaluation of an objective have to know.

    Attributes:
        formats: values of `data.*.format` that it learns from.
        figures: what its evaluations give, the loss first.
        implementation: imports and returns the function `(train, data, teacher_of) -> Objective` of
            `model.objectives.base`, where `train` is the config section, `data` the prepared data
            and `teacher_of()` loads the teacher.
        keys: keys of `train` that belong to it alone.
        head: its models have a task head, which reads whole sequences. Unless examples are pairs,
            `data.problem` and `data.labels` are its keys.
        teacher: it needs `train.kd`.
        chunked: documents are cut into chunks also where `data.chunk` is not written.
        smooth: `train.label_smoothing` has a distribution to smooth.
        pairs: examples are pairs of answers.
        reference: it needs the log-probabilities of another model, measured before training.
        rollouts: it learns from what the model says during training, which `rewards` score; the
            sequences of each of its examples. 0 where examples are given.
        credit: imports and returns its way from scored completions to examples, a
            `train.credit.Credit`.
        compares: it compares completions of one prompt, of which it needs two.
        critic: its model has a value head, see `model.critic`.
        base: whether its losses read the model before training, by the section `train`.
        scaled: its keys change the scale of `eval_loss`, so that the losses of trials that differ
            in them do not compare.
        unpackable: why trials cannot share one process; None where they can.
        lr: `train.lr` where it is not written, for all weights and for adapters; None is the
            default of the key.
    """

    formats: tuple[str, ...]
    figures: tuple[Figure, ...]
    implementation: Callable[[], Callable[..., Any]]
    keys: tuple[str, ...] = ()
    head: bool = False
    teacher: bool = False
    chunked: bool = False
    smooth: bool = True
    pairs: bool = False
    reference: bool = False
    rollouts: int = 0
    credit: Callable[[], Callable[..., Any]] | None = None
    compares: bool = False
    critic: bool = False
    base: Callable[[Any], bool] = lambda train: False
    scaled: bool = False
    unpackable: str | None = None
    lr: tuple[float, float] | None = None

    @property
    def of_answers(self) -> bool:
        """Sequences are answers to prompts, several to one; each trial of a packed engine has keys
        of its own.
        """
        return self.pairs or self.rollouts > 0

    @property
    def drops(self) -> bool:
        """Examples that are too long are left out by default, since the end of a prompt or of an
        answer cannot be missing.
        """
        return self.of_answers or self.reference


def _tokens() -> Callable[..., Any]:
    from raytune_ft.model.objectives.tokens import token_objective

    return token_objective


def _rationale() -> Callable[..., Any]:
    from raytune_ft.model.objectives.tokens import rationale

    return rationale


def _classification() -> Callable[..., Any]:
    from raytune_ft.model.objectives.classification import classification

    return classification


def _distillation() -> Callable[..., Any]:
    from raytune_ft.model.objectives.distillation import distillation

    return distillation


def _kto() -> Callable[..., Any]:
    from raytune_ft.model.objectives.unpaired import kto

    return kto


def _reward() -> Callable[..., Any]:
    from raytune_ft.model.objectives.reward import reward

    return reward


PAIRS = ("preference",)
PROMPTS = ("prompt", "prompt_completion", "messages", "sharegpt", "alpaca")
REWARD = Figure("eval_reward", "max", ("reward", "examples"))
SCORED_FIGURES = (
    REWARD,
    Figure("eval_completion_tokens", "min", ("completion_tokens", "examples"), neutral=True),
    Figure("eval_truncated", "min", ("truncated", "examples"), label="share that was cut"),
)
"""Of completions that rewards have scored."""
SAID_FIGURES = (
    LOSS,
    *SCORED_FIGURES,
    Figure(
        "eval_kl",
        "min",
        ("kl", "examples"),
        label="KL from the model before training",
        measured=False,
    ),
)
"""Of what a model says to prompts. The loss is minus the mean reward."""


def _of_pairs(name: str, lr: tuple[float, float], reference: bool = False) -> ObjectiveFacts:
    """A loss on the log-probabilities of pairs, the function `name` of
    `model.objectives.preference`.
    """

    def load() -> Callable[..., Any]:
        from raytune_ft.model.objectives import preference

        built: Callable[..., Any] = getattr(preference, name)
        return built

    return ObjectiveFacts(
        PAIRS,
        PAIR_FIGURES,
        load,
        keys=(name,),
        smooth=False,
        pairs=True,
        reference=reference,
        scaled=True,
        lr=lr,
    )


def _on_rollouts(
    key: str,
    load: Callable[[], Callable[..., Any]],
    credit: str,
    base: Callable[[Any], bool],
    sequences: int = 1,
    compares: bool = True,
    critic: bool = False,
) -> ObjectiveFacts:
    """A loss on what the model says. `credit`: a class of `train.credit`; `sequences`: of each
    example.
    """

    def load_credit() -> Callable[..., Any]:
        from raytune_ft.train import credit as ways

        found: Callable[..., Any] = getattr(ways, credit)
        return found

    return ObjectiveFacts(
        PROMPTS,
        SAID_FIGURES,
        load,
        keys=("rollout", key),
        smooth=False,
        rollouts=sequences,
        credit=load_credit,
        compares=compares,
        critic=critic,
        base=base,
        lr=(1e-6, 2e-5),
        unpackable="trains a critic, which packed runs lack" if critic else None,
    )


def _grpo() -> Callable[..., Any]:
    from raytune_ft.model.objectives.policy import grpo

    return grpo


def _online_dpo() -> Callable[..., Any]:
    from raytune_ft.model.objectives.preference import dpo

    return dpo


def _ppo() -> Callable[..., Any]:
    from raytune_ft.model.objectives.ppo import ppo

    return ppo


OBJECTIVES: dict[str, ObjectiveFacts] = {
    "sft": ObjectiveFacts(COMPLETIONS, TOKEN_FIGURES, _tokens),
    "clm": ObjectiveFacts(
        ("text",), (LOSS, PERPLEXITY, TOKEN_ACCURACY, EXACT_MATCH), _tokens, chunked=True
    ),
    "classification": ObjectiveFacts(
        ("classification",),
        (LOSS, ACCURACY, MACRO_F1, CALIBRATION_ERROR, MSE, R2, PEARSON),
        _classification,
        keys=("class_weights",),
        head=True,
    ),
    "rationale": ObjectiveFacts(
        ("rationale",), TOKEN_FIGURES, _rationale, keys=("rationale_weight",)
    ),
    "kd": ObjectiveFacts(COMPLETIONS, TOKEN_FIGURES, _distillation, keys=("kd",), teacher=True),
    "dpo": _of_pairs("dpo", lr=(1e-6, 2e-5), reference=True),
    "orpo": _of_pairs("orpo", lr=(8e-6, 8e-5)),
    "simpo": _of_pairs("simpo", lr=(1e-6, 2e-5)),
    "kto": ObjectiveFacts(
        ("unpaired",),
        (
            LOSS,
            Figure(
                REWARD_MARGIN.name, "max", ("good_reward", "good", "bad_reward", "bad"), mean_gap
            ),
            Figure("eval_kl", "min", ("kl", "examples"), label="KL from the reference"),
        ),
        _kto,
        keys=("kto",),
        smooth=False,
        reference=True,
        scaled=True,
        lr=(1e-6, 2e-5),
        unpackable="measures the KL of a whole step before its losses",
    ),
    "grpo": _on_rollouts("grpo", _grpo, "GroupAdvantages", lambda train: train.grpo.beta > 0),
    "online_dpo": _on_rollouts(
        "dpo", _online_dpo, "BestAgainstWorst", lambda train: True, sequences=2
    ),
    "ppo": _on_rollouts(
        "ppo",
        _ppo,
        "TokenAdvantages",
        lambda train: train.ppo.kl_coef > 0,
        compares=False,
        critic=True,
    ),
    "reward": ObjectiveFacts(
        PAIRS,
        (LOSS, REWARD_ACCURACY, REWARD_MARGIN),
        _reward,
        keys=("reward",),
        head=True,
        smooth=False,
        pairs=True,
        scaled=True,
        lr=(1e-5, 1e-4),
    ),
}
SHARED_KEYS = (
    "label_smoothing",
    "neftune_alpha",
    *(
        key
        for entry in OBJECTIVES.values()
        if not entry.of_answers and entry.unpackable is None
        for key in entry.keys
    ),
)
"""Keys of `train` that all trials of one packed engine have in common."""


def figures(
    objective: str, problem: str = "single_label", trained: bool = False
) -> tuple[Figure, ...]:
    """What an evaluation of such a run gives; with `trained` only what training evaluates."""
    return tuple(
        figure
        for figure in OBJECTIVES[objective].figures
        if (not figure.problems or problem in figure.problems) and (figure.trained or not trained)
    )


class _Searchable(Mapping[str, Figure]):
    """The figures that `search.metric` may name, of all objectives that there are now, and
    `eval_reward:NAME`.
    """

    def _now(self) -> dict[str, Figure]:
        entries = OBJECTIVES.values()
        found = [each for one in entries for each in one.figures]
        return {each.name: each for each in found if each.trained and not each.neutral}

    def __getitem__(self, name: str) -> Figure:
        if name.startswith(f"{REWARD.name}:"):
            return Figure(name, REWARD.mode)
        return self._now()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._now())

    def __len__(self) -> int:
        return len(self._now())


SEARCHABLE = _Searchable()
