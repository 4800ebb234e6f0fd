"""What the `search` section of a config file may say."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from raytune_ft.config.section import Positive, Section


class AshaConfig(Section):
    """Asynchronous successive halving (arXiv 1810.05934), measured in examples seen."""

    name: Literal["asha"] = "asha"
    grace_examples: Positive = Field(1000, description="the first rung")
    reduction_factor: Annotated[int, Field(ge=2)] = Field(3, description="one in this many goes on")


class Distribution(Section):
    """One line of the search space; exactly one of its keys is written."""

    uniform: list[float] | None = Field(None, description="[low, high]")
    log_uniform: list[float] | None = Field(None, description="[low, high], both above 0")
    int_uniform: list[int] | None = Field(None, description="[low, high], both included")
    choice: list[Any] | None = Field(None, description="any number of values")

    @property
    def kind(self) -> str:
        """The key that is written."""
        return next(iter(self.model_dump(exclude_none=True)))

    @property
    def values(self) -> list[Any]:
        """The bounds, or the choices."""
        return list(getattr(self, self.kind))

    @model_validator(mode="after")
    def _one_kind_in_order(self) -> Distribution:
        written = self.model_dump(exclude_none=True)
        if len(written) != 1:
            raise ValueError("needs exactly one of uniform, log_uniform, int_uniform, choice")
        kind, values = next(iter(written.items()))
        if kind == "choice":
            if not values:
                raise ValueError("choice is empty; write at least one value")
            return self
        if len(values) != 2 or values[0] >= values[1]:
            raise ValueError(f"{kind}={values} is not [low, high] with low < high")
        if kind == "log_uniform" and values[0] <= 0:
            raise ValueError(f"log_uniform={values} needs low > 0")
        return self


class SearchConfig(Section):
    """Which trials are run."""

    trials: Positive = 16
    metric: Literal["eval_loss", "eval_token_accuracy", "eval_exact_match"] = "eval_loss"
    mode: Literal["min", "max"] = "min"
    max_concurrent: Literal["auto"] | Positive = Field(
        "auto", description="trials at a time; auto is what the cluster holds in whole bundles"
    )
    execution: Literal["auto", "isolated"] = Field(
        "auto", description="isolated: a worker group for each trial, which auto chooses today"
    )
    sampler: Literal["tpe", "random"] = "tpe"
    scheduler: AshaConfig | None = Field(
        default_factory=AshaConfig, description="null runs every trial to its end"
    )
    storage: str | None = Field(
        None,
        description="Optuna storage URL; null is study.db in the sweep's directory. A password "
        "is written as ${ENV_NAME}",
    )
    space: dict[str, Distribution] = Field(min_length=1)
