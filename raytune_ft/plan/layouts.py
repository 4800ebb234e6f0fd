"""The layouts that a config could run under: what each needs, and why it is rejected."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from raytune_ft.config.schema import Config, ParallelConfig
from raytune_ft.data.split import TokenizedSplit
from raytune_ft.estimate.cost import StepCost, step_cost
from raytune_ft.estimate.hardware import GIB, PROCESS, Hardware
from raytune_ft.estimate.memory import Memory, MemoryModel, Work, teaching_of, work_of
from raytune_ft.estimate.parameters import Shell

POLICIES = ("none", "selective", "full")


@dataclass(frozen=True)
class Option:
    """One layout. `rejected` says why, and is None where it fits."""

    parallel: ParallelConfig
    memory: Memory
    cost: StepCost
    rejected: str | None

    @property
    def name(self) -> str:
        """As a person would say it."""
        parallel = self.parallel
        words: list[str] = [parallel.strategy]
        if parallel.strategy == "deepspeed":
            words.append(f"zero_stage {parallel.zero_stage}")
        if parallel.replicas > 1:
            words.append(f"replicas {parallel.replicas}")
        if parallel.strategy == "fsdp" and not parallel.reshard_after_forward:
            words.append("not resharded")
        if parallel.offload != "none":
            words.append(f"offload {parallel.offload}")
        return ", ".join(words)


@dataclass(frozen=True)
class NodeChoice:
    """The fastest option that fits on so many nodes, or why there is none."""

    nodes: int
    workers: int
    option: Option | None
    rejected: str | None


class Planner:
    """Weighs layouts of one config on nodes of one kind."""

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
        self.works = {count: work_of(config, split, count, hardware.device) for count in fitting}
        width = max(work.width for work in self.works.values())
        rows = tuple(-(-work.tokens // width) for work in self.works.values())
        self._model = MemoryModel(shell, rows, width, teaching_of(config))

    @property
    def exact(self) -> bool:
        """Could the model be traced?"""
        return self._model.traced(self.config.parallel).exact

    def work(self, parallel: ParallelConfig) -> Work:
        """What a worker computes."""
        return self.works[parallel.max_workers]

    def weigh(self, parallel: ParallelConfig, hardware: Hardware | None = None) -> Option:
        """One layout, on the hardware of the plan or on fewer nodes of it."""
        hardware = hardware or self.hardware
        work = self.work(parallel)
        memory = self._model.estimate(parallel, work, hardware.device, self.saves_midway)
        cost = step_cost(self.shell, parallel, work, hardware)
        return Option(parallel, memory, cost, _too_large(memory, hardware))

    def options(self, workers: int, hardware: Hardware) -> list[Option]:
        """Layouts from the plainest to the thriftiest, each with checkpointing as far as needed.

        What does not fit even with all of it is listed once.
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
        """The best for one node, two, four and so on."""
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
        if workers == 1:
            return [plain.model_copy(update={"strategy": "single"})]
        changes: list[dict[str, object]] = [{"strategy": "ddp"}, {"strategy": "fsdp"}]
        changes.append({"strategy": "fsdp", "reshard_after_forward": False})
        divides = 1 < hardware.nodes < workers and workers % hardware.nodes == 0
        if divides and not self.config.parallel.elastic:
            changes.append({"strategy": "fsdp", "replicas": hardware.nodes})
        if self.shell.precision != "float64":
            changes += [{"strategy": "deepspeed", "zero_stage": stage} for stage in (1, 2, 3)]
        if hardware.device == "cuda":
            changes.append({"strategy": "fsdp", "offload": "all"})
        return [plain.model_copy(update=change) for change in changes]


def node_counts(most: int) -> list[int]:
    """1, 2, 4 and so on, and the most itself."""
    powers = [2**power for power in range(most.bit_length()) if 2**power < most]
    return [*powers, most]


def fastest(options: Sequence[Option]) -> Option | None:
    """Of those that fit; the plainest one where several are as fast, as far as this can tell."""
    fitting = [option for option in options if option.rejected is None]
    least = min((option.cost.step_s for option in fitting), default=0.0)
    return next((option for option in fitting if option.cost.step_s <= 1.05 * least), None)


def _too_large(memory: Memory, hardware: Hardware) -> str | None:
    if hardware.fits(memory.peak):
        return None
    assert hardware.usable is not None
    needed = (memory.peak + PROCESS[hardware.device]) / GIB
    return f"does not fit: needs {needed:,.1f} GiB, has {hardware.usable / GIB:,.1f} GiB"
