"""The strategies: what the rest of the package asks about each instead of its name.

A strategy is added by one file with its class and one entry in `STRATEGIES`. The class holds
everything that needs torch (see `strategy.base.Strategy`), its estimates of memory and traffic
included, and is imported by the entry's `implementation`. This module loads no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from raytune_ft.errors import ConfigError


def _accept(parallel: Any) -> None:
    """Every combination of keys is valid."""


def _undescribed(parallel: Any) -> Mapping[str, str]:
    """The strategy has no keys that tell its layouts apart."""
    return {}


@dataclass(frozen=True)
class StrategyFacts:
    """Facts of one strategy.

    implementation: imports and returns its class, a `strategy.base.Strategy`.
    one_process: it runs in a single process; all others need a process group.
    shards: every worker holds a part of all weights, those of a frozen base included.
    replicas: it supports `parallel.replicas`.
    offload: values of `parallel.offload` that it supports, beside none.
    float64: it supports `train.precision: float64`.
    late_groups: a parameter group may start to train after the first step.
    one_run: its processes train one run; those of others train the next trial of a sweep too.
    unpackable: why trials of a sweep cannot be packed under it, None where they can.
    own_keys: keys of `parallel` that are refused unless this strategy is written.
    check: raises ConfigError for keys of `parallel` that contradict each other.
    layouts: changes of `parallel` that `plan` compares, beside `parallel.replicas`.
    describe: of `parallel`, "key=value" and the words for it, for keys that tell layouts apart.
    """

    implementation: Callable[[], Any]
    one_process: bool = False
    shards: bool = False
    replicas: bool = False
    offload: tuple[str, ...] = ()
    float64: bool = True
    late_groups: bool = True
    one_run: bool = False
    unpackable: str | None = None
    own_keys: tuple[str, ...] = ()
    check: Callable[[Any], None] = _accept
    layouts: tuple[Mapping[str, Any], ...] = ({},)
    describe: Callable[[Any], Mapping[str, str]] = _undescribed


def _describe_fsdp(parallel: Any) -> Mapping[str, str]:
    if parallel.reshard_after_forward:
        return {}
    return {"parallel.reshard_after_forward=false": "not resharded"}


def _check_deepspeed(parallel: Any) -> None:
    if parallel.offload == "all" and parallel.zero_stage < 3:
        raise ConfigError(
            "parallel.offload=all",
            f"moves weights to host memory, and parallel.zero_stage={parallel.zero_stage} does not "
            "shard weights",
            "write parallel.zero_stage: 3, or parallel.offload: optimizer",
        )


def _describe_deepspeed(parallel: Any) -> Mapping[str, str]:
    stage = parallel.zero_stage
    return {f"parallel.zero_stage={stage}": f"zero_stage {stage}"}


def _single() -> Any:
    from raytune_ft.strategy.single import Single

    return Single


def _ddp() -> Any:
    from raytune_ft.strategy.ddp import Ddp

    return Ddp


def _fsdp() -> Any:
    from raytune_ft.strategy.fsdp import Fsdp

    return Fsdp


def _deepspeed() -> Any:
    from raytune_ft.strategy.deepspeed import DeepSpeed

    return DeepSpeed


STRATEGIES: dict[str, StrategyFacts] = {
    "single": StrategyFacts(_single, one_process=True),
    "ddp": StrategyFacts(_ddp),
    "fsdp": StrategyFacts(
        _fsdp,
        shards=True,
        replicas=True,
        offload=("all",),
        layouts=({}, {"reshard_after_forward": False}, {"offload": "all"}),
        describe=_describe_fsdp,
    ),
    "deepspeed": StrategyFacts(
        _deepspeed,
        shards=True,
        offload=("optimizer", "all"),
        float64=False,
        late_groups=False,
        one_run=True,  # DeepSpeed remembers the groups of its process
        unpackable="shards trained weights, and the base of packed trials is frozen",
        own_keys=("deepspeed",),
        check=_check_deepspeed,
        layouts=tuple({"zero_stage": stage} for stage in (1, 2, 3)),
        describe=_describe_deepspeed,
    ),
}
"""From plain to thrifty: `auto` and `plan` prefer the first one that does."""

ALONE, REPLICATED, SHARDED = "single", "ddp", "fsdp"
"""What `parallel.strategy: auto` chooses among by the number of workers and their memory."""


def candidates(parallel: Any) -> list[str]:
    """The written strategy; under `auto` all that support the offload and replicas that are
    written.
    """
    if parallel.strategy != "auto":
        return [parallel.strategy]
    return [
        name
        for name, facts in STRATEGIES.items()
        if parallel.offload in ("none", *facts.offload)
        and (facts.replicas or parallel.replicas == 1)
    ]
