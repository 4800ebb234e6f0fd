"""What the `search` section of a config file may say."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from raytune_ft.config.objectives import SEARCHABLE
from raytune_ft.config.section import NameIn, Positive, Section


class AshaConfig(Section):
    """Asynchronous successive halving (arXiv 1810.05934), measured in examples seen."""

    name: Literal["asha"] = "asha"
    grace_examples: Positive = Field(1000, description="the first rung")
    reduction_factor: Annotated[int, Field(ge=2)] = Field(3, description="one in this many goes on")


class HyperbandConfig(Section):
    """ASHA with several first rungs, for when it is unknown how early a trial can be judged."""

    name: Literal["hyperband"]
    grace_examples: Positive = Field(1000, description="the first rung of the first bracket")
    reduction_factor: Annotated[int, Field(ge=2)] = Field(3, description="one in this many goes on")
    brackets: Annotated[int, Field(ge=2)] = Field(
        3, description="each begins a rung later; most trials are in the first"
    )


class MedianConfig(Section):
    """The median stopping rule of Google Vizier (Golovin et al., 2017)."""

    name: Literal["median"]
    grace_examples: Positive = Field(1000, description="nobody is stopped before")
    min_trials: Positive = Field(
        3, description="others that must have come as far before anybody is stopped"
    )


SchedulerConfig = Annotated[
    AshaConfig | HyperbandConfig | MedianConfig, Field(discriminator="name")
]


class BudgetConfig(Section):
    """What all trials together may spend, over resumes too; whichever is used up first ends it."""

    examples: Positive | None = Field(None, description="examples that trials train on, together")
    wall_s: Annotated[float, Field(gt=0)] | str | None = Field(
        None, description="time of the sweep: seconds, or a text such as 90m, 2h, 1d"
    )
    gpu_hours: Annotated[float, Field(gt=0)] | None = Field(
        None, description="GPUs that trials hold, times the hours that they hold them"
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
        description="drawn only where another line, a choice, has this value or one of this list: "
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
OfSource = Annotated[str, Field(pattern=r"^eval_loss:[A-Za-z0-9][A-Za-z0-9_-]*$")]


class SearchConfig(Section):
    """Which trials are run."""

    trials: Literal["auto"] | Positive = Field(
        "auto", description="auto is 16; under sampler: grid the whole grid, which limits a number"
    )
    metric: Metric | list[Metric | OfSource] = Field(
        "eval_loss",
        description="of a list, the first ranks and stops trials and chooses their checkpoints; "
        "the others may be losses of single sources, such as eval_loss:general",
    )
    mode: Literal["auto", "min", "max"] | list[Literal["min", "max"]] = Field(
        "auto",
        description="auto: min for losses and errors, max for the others; a list goes with a list",
    )
    budget: BudgetConfig | None = Field(
        None,
        description="beside trials: no trial begins after it, running ones end at their next "
        "evaluation as pruned",
    )
    max_concurrent: Literal["auto"] | Positive = Field(
        "auto", description="trials at a time; auto is what the cluster holds in whole bundles"
    )
    execution: Literal["auto", "packed", "isolated"] = Field(
        "auto",
        description="packed: LoRA trials share one frozen base in one worker group, which auto "
        "chooses where they can; isolated: a worker group for each trial",
    )
    sampler: Literal["tpe", "gp", "cmaes", "random", "grid"] = Field(
        "tpe",
        description="tpe: any space; gp: a Gaussian process, best with few trials; cmaes: numbers "
        "alone, best with many; grid: every combination of choices once",
    )
    defaults: bool = Field(
        True,
        description="begin with the values of this file, then with a published learning rate, "
        "where they lie in the space; never under grid",
    )
    first: list[dict[str, Any]] = Field(
        default_factory=list,
        description="points to try first, such as [{train.lr: 1e-4}]; the rest of a point is as "
        "in this file, or drawn where that lies outside the space",
    )
    scheduler: SchedulerConfig | None = Field(
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
        description="what every trial must meet, such as train.batch_size * method.rank <= 512: "
        "arithmetic, comparisons, and, or, not over lines of the space",
    )

    @property
    def metrics(self) -> list[str]:
        """What trials are judged by, the first first."""
        return [self.metric] if isinstance(self.metric, str) else list(self.metric)

    @property
    def modes(self) -> list[Literal["min", "max"]]:
        """Which way each metric is better."""
        return [SEARCHABLE[metric.partition(":")[0]].mode for metric in self.metrics]
