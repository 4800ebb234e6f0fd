"""Validate, resolve, tokenise and estimate; nothing is started."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from raytune_ft.config.environment import joins_cluster
from raytune_ft.config.load import (
    apply_overrides,
    asked_rewards,
    expand_env,
    holds_base,
    load_config,
)
from raytune_ft.config.objectives import OBJECTIVES
from raytune_ft.config.schema import Config
from raytune_ft.config.search_rules import check_examples
from raytune_ft.preflight import lay_out, placed, prepare
from raytune_ft.report.terminal import marked
from raytune_ft.rundir import probe_storage, run_path

if TYPE_CHECKING:
    from raytune_ft.data.prepared import PreparedData
    from raytune_ft.data.report import DataReport
    from raytune_ft.estimate.hardware import Hardware
    from raytune_ft.estimate.parameters import Shell
    from raytune_ft.plan.layouts import NodeChoice, Option
    from raytune_ft.ray_backend.cluster import Room

PER_NODE = 8


@dataclass(frozen=True)
class Asked:
    """Hardware named on the command line; by default this machine or the joined cluster."""

    nodes: int | None = None
    per_node: int | None = None
    accelerator: str | None = None


@dataclass(frozen=True)
class Duration:
    """Seconds of one run: for its steps, and for its evaluations on the whole validation set."""

    training_s: float
    evaluation_s: float
    workers: int

    @property
    def total_s(self) -> float:
        """Seconds, without start-up and checkpoints."""
        return self.training_s + self.evaluation_s

    @property
    def worker_hours(self) -> float:
        """Hours of all workers together."""
        return self.total_s * self.workers / 3600


@dataclass(frozen=True)
class Plan:
    """Everything that `plan` prints."""

    config: Config
    passes: tuple[str, ...]
    reason: str
    total_parameters: int
    trained_parameters: int
    hardware: Hardware
    own: Option
    options: tuple[Option, ...]
    node_choices: tuple[NodeChoice, ...]
    duration: Duration
    node_durations: tuple[Duration | None, ...]
    asha_share: float
    report: DataReport
    quotas: Mapping[str, int]
    example: str
    budget_examples: int
    steps: int
    tokens: int
    flops: float
    notes: tuple[str, ...]


def make_plan(
    file: Path, overrides: Sequence[str], tell: Callable[[str], None], asked: Asked | None = None
) -> Plan:
    """Make the plan of a config file; raises what `train` or `sweep` would."""
    asked = asked or Asked()
    loaded = load_config(file, overrides, tell)
    per_node = _per_node(loaded, asked)
    written = on_hardware(loaded, asked)
    usable = _usable(written, asked)
    with placed(written, usable, tell) as (config, reason):
        probe_storage(run_path(config).parent)
        room = _room(config, asked)
    expanded = expand_env(config)
    data = prepare(expanded, tell)

    from raytune_ft.data.formats import describe_example, describe_target
    from raytune_ft.estimate.cost import evaluation_flops, step_flops
    from raytune_ft.estimate.memory import said_of
    from raytune_ft.estimate.parameters import Shells
    from raytune_ft.model.experts import expert_notes
    from raytune_ft.model.lengths import notes_of
    from raytune_ft.model.load import head_notes, load_tokenizer
    from raytune_ft.model.routers import router_notes
    from raytune_ft.plan.layouts import Planner
    from raytune_ft.train.optim import total_examples
    from raytune_ft.train.run_state import Schedule
    from raytune_ft.train.setup import head_of, plain_order

    order = plain_order(expanded, data.train)
    budget = total_examples(config.train, len(order))
    if config.search is not None:
        check_examples(config.search, budget)
    schedule = Schedule.of(config.train, len(order), config.checkpoint.every_examples)
    steps = schedule.total_steps
    midway = any(
        schedule.due(step, every)
        for step in range(1, steps)
        for every in (schedule.eval_every, schedule.save_every)
    )
    head = head_of(expanded, data.report)
    shells = Shells(head)
    shell = shells.of(expanded)
    hardware = _hardware(config, asked, per_node, room)
    passes: list[str] = []
    layouts = lay_out(expanded, data, hardware.usable, hardware, passes.append, shells)
    asked_for = config
    config = layouts.get(config.method.name, next(iter(layouts.values()))).of(config)
    planner = Planner(config, shell, data.train, hardware, midway)
    own = planner.weigh(config.parallel)
    options = planner.options(config.parallel.max_workers, hardware)
    choices = planner.node_choices() if hardware.nodes > 1 else []
    evaluations = 1 + -(-budget // config.train.eval_every_examples)
    held_out = data.validation
    labels = int(held_out.label_counts.sum())
    measured = evaluations * evaluation_flops(shell, len(held_out.input_ids), labels)

    def duration(option: Option) -> Duration:
        workers = option.parallel.max_workers
        rate = hardware.tflops * 1e12 * workers
        return Duration(steps * option.cost.step_s, measured / rate, workers)

    work, (times, said) = planner.work(config.parallel), said_of(expanded)
    pieces = describe_example(data.train, 0, load_tokenizer(expanded.model))
    flops = step_flops(shell, config.parallel, work) * config.parallel.max_workers * steps
    return Plan(
        config=asked_for,
        passes=tuple(passes),
        reason=reason,
        total_parameters=shell.total,
        trained_parameters=shell.trained,
        hardware=hardware,
        own=own,
        options=tuple(options),
        node_choices=tuple(choices),
        duration=duration(own),
        node_durations=tuple(duration(c.option) if c.option else None for c in choices),
        asha_share=config.search.cost_share(budget) if config.search else 1.0,
        report=data.report,
        quotas=dict(zip(data.report.names, order.quotas, strict=False)),
        example=marked(pieces) + describe_target(data.train, 0, data.report),
        budget_examples=budget,
        steps=steps,
        tokens=round(
            budget * times * (data.train.lengths[order.indices(0, len(order))].mean() + said)
        ),
        flops=flops,
        notes=(
            *_notes(config, data, shell, planner.exact),
            *notes_of(shell.module.config, data.extent),
            *router_notes(shell.module),
            *expert_notes(shell.module),
            *head_notes(expanded.model, head),
        ),
    )


def on_hardware(config: Config, asked: Asked) -> Config:
    """The config with the workers that the command line names."""
    changes: dict[str, object] = {}
    if asked.accelerator is not None:
        resources = {**config.parallel.resources, "GPU": 1.0}
        changes["parallel.resources_per_worker"] = resources
    if asked.nodes is not None or asked.per_node is not None:
        changes["parallel.workers"] = (asked.nodes or 1) * _per_node(config, asked)
    return apply_overrides(config, changes) if changes else config


def _per_node(config: Config, asked: Asked) -> int:
    if asked.per_node is not None:
        return asked.per_node
    if asked.nodes is not None and asked.accelerator is not None:
        return PER_NODE
    workers = config.parallel.max_workers
    return min(PER_NODE, workers) if asked.accelerator is not None else workers


def _usable(config: Config, asked: Asked) -> int | None:
    """Usable bytes of a worker of the named accelerator; None without one, where `placed` asks."""
    if asked.accelerator is None:
        return None
    from raytune_ft.estimate.hardware import named

    return named(asked.accelerator, 1, 1, config.train.precision).usable


def _room(config: Config, asked: Asked) -> Room | None:
    """The resources of the joined cluster, None without one or with a named accelerator."""
    if asked.accelerator is not None or not joins_cluster():
        return None
    from raytune_ft.ray_backend.cluster import cluster_room

    return cluster_room(config.parallel)


def _hardware(config: Config, asked: Asked, per_node: int, room: Room | None) -> Hardware:
    """The named accelerator, the joined cluster or this machine. A cluster without a known
    accelerator is given the rates of this machine.
    """
    from raytune_ft.estimate.hardware import machine, named

    resources, precision = config.parallel.resources, config.train.precision
    nodes = asked.nodes or -(-config.parallel.max_workers // per_node)
    if room is not None and asked.nodes is None and asked.per_node is None:
        nodes, per_node = room.nodes, room.per_node
    accelerator = asked.accelerator if room is None else room.accelerator
    if accelerator is not None:
        found = named(accelerator, nodes, per_node, precision).shared(resources["GPU"])
    else:
        found = replace(machine(per_node, resources, precision), nodes=nodes)
    if room is None:
        return found
    whole = found.memory if accelerator is not None and room.usable is not None else room.usable
    return replace(found, memory=whole, usable=room.usable, host=room.host)


def _notes(config: Config, data: PreparedData, shell: Shell, exact: bool) -> tuple[str, ...]:
    from raytune_ft.train.distill import logits_file

    noise = {
        "method.dropout": getattr(config.method, "dropout", 0.0),
        "train.neftune_alpha": config.train.neftune_alpha,
    }
    notes = [
        f"{key}={value} draws noise: the run is reproducible with this number of workers and this "
        "packing only"
        for key, value in noise.items()
        if value
    ]
    if (kept := logits_file(config, data)) is not None:
        notes.append(
            f"train.kd.cache: disk keeps {kept} in {data.path.parent}; "
            "its one pass over the data is not part of the estimated time"
        )
    elif config.train.kd is not None:
        notes.append("the teacher's passes, one in every step, are not part of the estimated time")
    if OBJECTIVES[config.train.objective].rollouts:
        own, batch = config.train.rollout, config.train.batch_size
        said = batch * own.steps_per_generation * own.num_generations
        notes.append(
            f"every {own.steps} steps the model says {said:,} completions of up to "
            f"{own.max_completion_length} tokens, which are scored; that is not part of the "
            "estimated time"
        )
        for judge in (each for each in asked_rewards(config) if each.compares):
            asked = said * (own.num_generations - 1)
            once = len(data.validation) * own.eval_completions * 2
            notes.append(
                f"rewards.{judge.called} compares completions in both orders: up to {asked:,} "
                f"questions every {own.steps} steps, and {once:,} in each evaluation"
            )
        if own.on_vllm:
            notes.append(
                f"train.rollout.engine: vllm samples on {own.vllm.engines} x {own.vllm.gpus} GPUs "
                "beside those of workers, which the estimate leaves out"
            )
        if holds_base(config):
            notes.append("every worker also holds the model before training, for the KL term")
    if run_path(config).exists():
        notes.append(f"{run_path(config)} exists: write --resume to continue it, or another name")
    longest = max(int(split.lengths.max()) for split in (data.train, data.validation))
    keys = getattr(shell.module.config, "index_topk", None)
    if keys is not None and keys < longest:
        notes.append(
            f"attention keeps index_topk={keys} keys of a row, and rows have up to {longest} "
            "tokens: which keys of equal score it keeps depends on the layout"
        )
    if config.data.test is None:
        notes.append(
            "without data.test, promotion evaluates on validation, which also chose the model"
        )
    if not exact:
        notes.append("activations are estimated by a formula, since this model could not be traced")
    return tuple(notes)
