"""What the `search` section of a config file may say."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from raytune_ft.config.objectives import SEARCHABLE
from raytune_ft.config.section import NameIn, Positive, Section, SectionOf


class SchedulerConfig(Section):
    """What the section of every scheduler has; a subclass narrows `name` to its own."""

    name: str
    grace_examples: Positive = Field(1000, description="no trial is stopped before")


class AshaConfig(SchedulerConfig):
    """Asynchronous successive halving (arXiv 1810.05934), measured in examples seen."""

    name: Literal["asha"] = "asha"
    grace_examples: Positive = Field(1000, description="the first rung")
    reduction_factor: Annotated[int, Field(ge=2)] = Field(
        3, description="one trial in this many goes on"
    )


class HyperbandConfig(SchedulerConfig):
    """ASHA with several first rungs, for when it is unknown how early a trial can be judged."""

    name: Literal["hyperband"]
    grace_examples: Positive = Field(1000, description="the first rung of the first bracket")
    reduction_factor: Annotated[int, Field(ge=2)] = Field(
        3, description="one trial in this many goes on"
    )
    brackets: Annotated[int, Field(ge=2)] = Field(
        3, description="each begins a rung later; most trials are in the first"
    )


class MedianConfig(SchedulerConfig):
    """The median stopping rule of Google Vizier (Golovin et al., 2017)."""

    name: Literal["median"]
    min_trials: Positive = Field(
        3, description="other trials that must have come as far before one is stopped"
    )


@dataclass(frozen=True)
class Scheduler:
    """A rule that stops trials before their end.

    Attributes:
        config: its section, whose `name` is the entry's name.
        implementation: loads the function (config, budget_examples, metric, mode) -> a scheduler of
            Ray Tune that is given `examples` and `metric` of each evaluation; `mode` is min or max.
        rungs: (config, examples) -> the rungs below `examples` that the report draws.
        cost_share: (config, budget_examples) -> the least share of a sweep's full cost that the
            rule leaves, for `plan`.
    """

    config: type[SchedulerConfig]
    implementation: Callable[[], Callable[[Any, int, str, str], Any]]
    rungs: Callable[[Any, int], list[int]] = lambda config, examples: []
    cost_share: Callable[[Any, int], float] = lambda config, budget_examples: 1.0


def _halving_rungs(config: AshaConfig | HyperbandConfig, examples: int) -> list[int]:
    """Those of the first bracket: each is `reduction_factor` times the one before."""
    rungs = []
    rung = config.grace_examples
    while rung < examples:
        rungs.append(rung)
        rung *= config.reduction_factor
    return rungs


def _halving_share(config: AshaConfig, budget_examples: int) -> float:
    """Of the trials that reach a rung, one in `reduction_factor` goes on.

    Asynchronous halving promotes some trials too early, so a sweep spends more.
    """
    spent, before, alive = 0.0, 0, 1.0
    for rung in _halving_rungs(config, budget_examples):
        spent += alive * (rung - before)
        before, alive = rung, alive / config.reduction_factor
    return (spent + alive * (budget_examples - before)) / budget_examples


def _rules() -> ModuleType:
    from raytune_ft.ray_backend import schedulers

    return schedulers


SCHEDULERS: dict[str, Scheduler] = {
    "asha": Scheduler(AshaConfig, lambda: _rules().asha, _halving_rungs, _halving_share),
    "hyperband": Scheduler(HyperbandConfig, lambda: _rules().hyperband, _halving_rungs),
    "median": Scheduler(MedianConfig, lambda: _rules().median),
}


class BudgetConfig(Section):
    """What all trials may spend together, across resumes. The first limit ends the sweep."""

    examples: Positive | None = Field(None, description="training examples of all trials")
    wall_s: Annotated[float, Field(gt=0)] | str | None = Field(
        None, description="time of the sweep: seconds, or a text such as 90m, 2h, 1d"
    )
    gpu_hours: Annotated[float, Field(gt=0)] | None = Field(
        None, description="GPUs that trials hold, times hours"
    )


KINDS = ("uniform", "log_uniform", "int_uniform", "choice")


class Distribution(Section):
    """One line of the search space; exactly one of its kinds is written."""

    uniform: list[float] | None = Field(None, description="[low, high]")
    log_uniform: list[float] | None = Field(None, description="[low, high], both above 0")
    int_uniform: list[int] | None = Field(None, description="[low, high], both included")
    choice: list[Any] | None = Field(None, description="any number of values")
    when: dict[str, Any] | None = Field(
        None,
        description="drawn only if another line, a choice, has this value or one of this list: "
        "{method.name: lora}",
    )

    @property
    def kind(self) -> str:
        """The kind that is written."""
        return next(kind for kind in KINDS if getattr(self, kind) is not None)

    @property
    def values(self) -> list[Any]:
        """The bounds, or the choices."""
        return list(getattr(self, self.kind))

    @model_validator(mode="after")
    def _one_kind_in_order(self) -> Distribution:
        if sum(getattr(self, kind) is not None for kind in KINDS) != 1:
            raise ValueError("needs exactly one of uniform, log_uniform, int_uniform, choice")
        kind, values = self.kind, self.values
        if kind == "choice":
            if not values:
                raise ValueError("choice is empty; write at least one value")
            return self
        if len(values) != 2 or values[0] >= values[1]:
            raise ValueError(f"{kind}={values} is not [low, high] with low < high")
        if kind == "log_uniform" and values[0] <= 0:
            raise ValueError(f"log_uniform={values} needs low > 0")
        return self


Metric = Annotated[str, NameIn(SEARCHABLE)]
OfReward = Annotated[str, Field(pattern=r"^eval_reward:.+$")]
OfSource = Annotated[str, Field(pattern=r"^eval_loss:[A-Za-z0-9][A-Za-z0-9_-]*$")]


class SearchConfig(Section):
    """Which trials are run."""

    trials: Literal["auto"] | Positive = Field(
        "auto", description="auto is 16, and the whole grid under sampler: grid, which has no more"
    )
    metric: Metric | OfReward | list[Metric | OfReward | OfSource] = Field(
        "eval_loss",
        description="of a list, the first ranks and stops trials and chooses their checkpoints; "
        "the others may be losses of single sources, such as eval_loss:general. "
        "eval_reward:NAME is what one of the rewards gives",
    )
    mode: Literal["auto", "min", "max"] | list[Literal["min", "max"]] = Field(
        "auto",
        description="auto: min for losses and errors, max for the others; a list goes with a list",
    )
    budget: BudgetConfig | None = Field(
        None,
        description="limits beside trials; once one is reached no trial starts, and running trials "
        "are pruned at their next evaluation",
    )
    max_concurrent: Literal["auto"] | Positive = Field(
        "auto", description="trials at a time; auto is the number that fits on the cluster"
    )
    execution: Literal["auto", "packed", "isolated"] = Field(
        "auto",
        description="packed: LoRA trials share one frozen base in one worker group; isolated: a "
        "worker group for each trial; auto: packed if the trials can share a base",
    )
    sampler: Literal["tpe", "gp", "cmaes", "random", "grid"] = Field(
        "tpe",
        description="tpe: any space; gp: a Gaussian process, best with few trials; cmaes: only "
        "numbers, best with many; grid: every combination of choices once",
    )
    defaults: bool = Field(
        True,
        description="first try the values of this file, then a published learning rate, if the "
        "space contains them; without effect under grid",
    )
    first: list[dict[str, Any]] = Field(
        default_factory=list,
        description="points to try first, such as [{train.lr: 1e-4}]; other keys have the value of "
        "this file, or are drawn if the space does not contain it",
    )
    scheduler: Annotated[SchedulerConfig, SectionOf(SCHEDULERS, "asha")] | None = Field(
        default_factory=AshaConfig, description="null runs every trial to its end"
    )
    storage: str | None = Field(
        None,
        description="Optuna storage URL; null is study.db in the sweep's directory. A password "
        "is written as ${ENV_NAME}",
    )
    warm_start: str | list[str] | None = Field(
        None,
        description="directories of earlier sweeps, from whose completed trials tpe and gp learn",
    )
    space: dict[str, Distribution] = Field(min_length=1)
    constraints: list[str] = Field(
        default_factory=list,
        description="conditions on every trial, such as train.batch_size * method.rank <= 512: "
        "arithmetic, comparisons, and, or, not over lines of the space",
    )

    def cost_share(self, budget_examples: int) -> float:
        """The least share of the sweep's full cost that the scheduler leaves; 1 without one."""
        if self.scheduler is None:
            return 1.0
        return SCHEDULERS[self.scheduler.name].cost_share(self.scheduler, budget_examples)

    @property
    def metrics(self) -> list[str]:
        """The metrics of the sweep; the first ranks trials."""
        return [self.metric] if isinstance(self.metric, str) else list(self.metric)

    @property
    def modes(self) -> list[Literal["min", "max"]]:
        """Which way each metric is better."""
        return [SEARCHABLE[metric.partition(":")[0]].mode for metric in self.metrics]
