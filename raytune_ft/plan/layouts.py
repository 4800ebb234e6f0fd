"""Layouts that a config could run under: memory and time of each, and which do not fit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from raytune_ft.config.schema import Config, ParallelConfig
from raytune_ft.config.strategies import STRATEGIES
from raytune_ft.data.split import TokenizedSplit
from raytune_ft.estimate.cost import StepCost, step_cost
from raytune_ft.estimate.hardware import Hardware
from raytune_ft.estimate.memory import (
    Memory,
    MemoryModel,
    Work,
    beside_of,
    misfit,
    work_of,
)
from raytune_ft.estimate.parameters import Shell
from raytune_ft.model.checkpointing import POLICIES
from raytune_ft.model.lengths import apart_of


@dataclass(frozen=True)
class Option:
    """One layout. `rejected`: why it does not fit, None where it does."""

    parallel: ParallelConfig
    memory: Memory
    cost: StepCost
    rejected: str | None

    @property
    def name(self) -> str:
        """The strategy and what tells its layouts apart."""
        return ", ".join(_described(self.parallel).values())

    @property
    def keys(self) -> list[str]:
        """What a config has to say for this layout, as key=value."""
        found = list(_described(self.parallel))
        if self.parallel.activation_checkpointing != "none":
            policy = self.parallel.activation_checkpointing
            found.append(f"parallel.activation_checkpointing={policy}")
        return found


@dataclass(frozen=True)
class NodeChoice:
    """The fastest option that fits on a number of nodes, or why none fits."""

    nodes: int
    workers: int
    option: Option | None
    rejected: str | None


class Planner:
    """Estimates layouts of one config on nodes of one kind."""

    def __init__(
        self,
        config: Config,
        shell: Shell,
        split: TokenizedSplit,
        hardware: Hardware,
        saves_midway: bool,
    ) -> None:
        self.config, self.shell, self.hardware = config, shell, hardware
        self.saves_midway = saves_midway
        own = config.parallel.max_workers
        counts = {own} | {n * hardware.per_node for n in node_counts(hardware.nodes)}
        fitting = [count for count in counts if count <= config.train.batch_size]
        apart = apart_of(shell.module.config)
        self.works = {
            count: work_of(config, split, count, hardware.device, apart) for count in fitting
        }
        width = max(work.width for work in self.works.values())
        rows = tuple(-(-work.tokens // width) for work in self.works.values())
        self._model = MemoryModel(shell, rows, width, beside_of(config))

    @property
    def exact(self) -> bool:
        """Whether the model could be traced, so that activations are not from a formula."""
        return self._model.traced(self.config.parallel).exact

    def work(self, parallel: ParallelConfig) -> Work:
        """What a worker computes."""
        return self.works[parallel.max_workers]

    def weigh(self, parallel: ParallelConfig, hardware: Hardware | None = None) -> Option:
        """Estimate one layout, on the hardware of the plan or on fewer of its nodes."""
        hardware = hardware or self.hardware
        work = self.work(parallel)
        memory = self._model.estimate(parallel, work, hardware.device, self.saves_midway)
        cost = step_cost(self.shell, parallel, work, hardware)
        return Option(parallel, memory, cost, misfit(memory, parallel, hardware))

    def options(self, workers: int, hardware: Hardware) -> list[Option]:
        """Layouts from the simplest to the one that needs least memory, each with the checkpointing
        policies up to the first that fits; one that never fits is listed with the last policy.
        """
        found: list[Option] = []
        for parallel in self._layouts(workers, hardware):
            tried = []
            for policy in POLICIES:
                changed = parallel.model_copy(update={"activation_checkpointing": policy})
                tried.append(self.weigh(changed, hardware))
                if tried[-1].rejected is None:
                    break
            found += tried if tried[-1].rejected is None else tried[-1:]
        return found

    def node_choices(self) -> list[NodeChoice]:
        """The fastest option for one node, two, four and so on."""
        found = []
        for nodes in node_counts(self.hardware.nodes):
            workers = nodes * self.hardware.per_node
            if workers not in self.works:
                batch = self.config.train.batch_size
                small = f"train.batch_size={batch} is smaller than {workers} workers"
                found.append(NodeChoice(nodes, workers, None, small))
                continue
            options = self.options(workers, replace(self.hardware, nodes=nodes))
            choice = fastest(options)
            least = min(options, key=lambda option: option.memory.peak)
            reason = None if choice else f"{least.name}: {least.rejected}"
            found.append(NodeChoice(nodes, workers, choice, reason))
        return found

    def _layouts(self, workers: int, hardware: Hardware) -> list[ParallelConfig]:
        plain = self.config.parallel.model_copy(
            update={
                "workers": workers,
                "replicas": 1,
                "reshard_after_forward": True,
                "offload": "none",
                "deepspeed": None,
            }
        )
        divides = 1 < hardware.nodes < workers and workers % hardware.nodes == 0
        replicated = divides and not self.config.parallel.elastic
        found: list[ParallelConfig] = []
        offloaded: list[ParallelConfig] = []
        for name, facts in STRATEGIES.items():
            if facts.one_process != (workers == 1):
                continue
            if self.shell.precision == "float64" and not facts.float64:
                continue
            layouts = [plain.model_copy(update={"strategy": name, **c}) for c in facts.layouts]
            found += [layout for layout in layouts if layout.offload == "none"]
            offloaded += [layout for layout in layouts if layout.offload != "none"]
            if facts.replicas and replicated:
                changes = {"strategy": name, "replicas": hardware.nodes}
                found.append(plain.model_copy(update=changes))
        return found + (offloaded if hardware.device == "cuda" else [])


def _described(parallel: ParallelConfig) -> dict[str, str]:
    """What tells a layout apart, as key=value and in words; checkpointing is told separately."""
    found = {f"parallel.strategy={parallel.strategy}": parallel.strategy}
    if parallel.replicas > 1:
        found[f"parallel.replicas={parallel.replicas}"] = f"replicas {parallel.replicas}"
    found |= STRATEGIES[parallel.strategy].describe(parallel)
    if parallel.offload != "none":
        found[f"parallel.offload={parallel.offload}"] = f"offload {parallel.offload}"
    return found


def node_counts(most: int) -> list[int]:
    """1, 2, 4 and so on, and `most` itself."""
    powers = [2**power for power in range(most.bit_length()) if 2**power < most]
    return [*powers, most]


def fastest(options: Sequence[Option]) -> Option | None:
    """The first option that fits and is within 5 % of the fastest, which the estimate cannot tell
    apart; None where none fits.
    """
    fitting = [option for option in options if option.rejected is None]
    least = min((option.cost.step_s for option in fitting), default=0.0)
    return next((option for option in fitting if option.cost.step_s <= 1.05 * least), None)
