"""A plan as text."""

from __future__ import annotations

from raytune_ft.config.execution import choose_execution
from raytune_ft.config.load import dump_yaml
from raytune_ft.config.search_space import trial_count
from raytune_ft.data.report import facts
from raytune_ft.estimate.memory import on_hosts
from raytune_ft.format import seconds, size
from raytune_ft.plan.layouts import NodeChoice, Option, fastest
from raytune_ft.plan.make import Duration, Plan
from raytune_ft.report.terminal import LOSS_BEGINS, LOSS_ENDS

_TERA_HOUR = 1e12 * 3600
Cells = tuple[str, ...]


def describe(plan: Plan) -> str:
    """The plan as text."""
    lines = [
        "config, resolved:",
        *("  " + line for line in dump_yaml(plan.config).rstrip().splitlines()),
        "",
        *_summary(plan),
        *_options(plan),
        *_nodes(plan),
        *_time(plan),
        *_data(plan),
        "",
        f"the first training example; {LOSS_BEGINS}...{LOSS_ENDS} carries loss:",
        *("  " + line for line in plan.example.splitlines()),
    ]
    if notes := [*plan.report.notes, *plan.notes]:
        lines += ["", "notes:", *(f"  {note}" for note in notes)]
    return "\n".join(lines)


def _summary(plan: Plan) -> list[str]:
    share = plan.trained_parameters / plan.total_parameters
    memory, hardware = plan.own.memory, plan.hardware
    has = size(hardware.usable) if hardware.usable is not None else "unknown"
    beside = {
        "buffers of gradients": memory.buffers,
        "gathered weights": memory.gathered,
        "activations": memory.activations,
        "logits": memory.logits,
    }
    passing = ", ".join(f"{name} {size(count)}" for name, count in beside.items() if count)
    host = [f"copy for checkpoints {size(memory.snapshot)}"]
    if memory.offloaded:
        host.insert(0, f"offloaded {size(memory.offloaded)}")
    held = {
        "parameters": memory.parameters,
        "gradients": memory.gradients,
        "optimizer": memory.optimizer,
    }
    held |= {"other models": memory.beside} if memory.beside else {}
    staying = ", ".join(f"{name} {size(count)}" for name, count in held.items())
    lines = [
        f"strategy: {plan.config.parallel.strategy} ({plan.reason})",
        *plan.passes,
        f"parameters: {plan.total_parameters:,}, of which {plan.trained_parameters:,} are trained "
        f"({share:.2%})",
        f"memory of a worker: {size(memory.peak)} at most, has {has}",
        f"  all the time: {staying}",
        f"  at the peak of a step: {passing}",
        f"  in host memory: {', '.join(host)}",
    ]
    if hardware.device == "cuda":
        of_node = size(on_hosts(memory, plan.own.parallel, hardware))
        has = f", has {size(hardware.host)}" if hardware.host is not None else ""
        lines.append(f"host memory of a node: {of_node}{has}")
    if plan.own.rejected:
        lines.append(f"  {plan.own.rejected}")
    if plan.config.search is not None:
        execution, why = choose_execution(plan.config)
        lines.insert(1, f"trials: {execution} ({why})")
    return lines


def _options(plan: Plan) -> list[str]:
    hardware = plan.hardware
    workers = plan.config.parallel.max_workers
    memory = f"{size(hardware.memory)} each" if hardware.memory else "memory unknown"
    nodes = f" on {hardware.nodes} nodes" if hardware.nodes > 1 else ""
    rate = f"{hardware.tflops:,.3g} TFLOP/s each ({hardware.source})"
    rows: list[Cells] = [("", "layout", "checkpointing", "memory", "step", "sent a step", "")]
    fastest_fit = fastest(plan.options)
    for option in plan.options:
        rows.append(
            (
                "*" if option is fastest_fit else "",
                option.name,
                option.parallel.activation_checkpointing,
                size(option.memory.peak),
                seconds(option.cost.step_s),
                size(option.cost.sent),
                option.rejected or "",
            )
        )
    return [
        f"options for {workers} x {hardware.name}{nodes}, {memory}, {rate}:",
        *table(rows),
        f"  *: {_advice(fastest_fit)}",
    ]


def _advice(option: Option | None) -> str:
    if option is None:
        return "nothing fits; use more or larger workers, or a smaller train.micro_tokens"
    return f"the fastest that fits, by this estimate: {' '.join(option.keys)}"


def _nodes(plan: Plan) -> list[str]:
    if not plan.node_choices:
        return []
    hours = {c.nodes: d.worker_hours for c, d in _choices(plan) if d is not None}
    cheapest = min(hours, key=lambda nodes: (round(hours[nodes], 2), nodes), default=None)
    rows: list[Cells] = [
        ("", "nodes", "workers", "layout", "checkpointing", "memory", "step", "a run", "")
    ]
    for choice, duration in _choices(plan):
        mark = "*" if choice.nodes == cheapest else ""
        if choice.option is None or duration is None:
            cells = ["-"] * 5
        else:
            cells = [
                choice.option.name,
                choice.option.parallel.activation_checkpointing,
                size(choice.option.memory.peak),
                seconds(choice.option.cost.step_s),
                f"{seconds(duration.total_s)}, {duration.worker_hours:.2g} worker-hours",
            ]
        rows.append((mark, f"{choice.nodes}", f"{choice.workers}", *cells, choice.rejected or ""))
    return [
        "nodes, each with the fastest layout that fits; *: the fewest worker-hours:",
        *table(rows),
    ]


def _choices(plan: Plan) -> list[tuple[NodeChoice, Duration | None]]:
    return list(zip(plan.node_choices, plan.node_durations, strict=True))


def _time(plan: Plan) -> list[str]:
    duration, cost = plan.duration, plan.own.cost
    lines = [
        f"budget: {plan.budget_examples:,} examples in {plan.steps:,} steps",
        f"compute of a run: {plan.tokens:,} tokens, about {plan.flops:.2g} FLOP without "
        f"evaluations, {plan.flops / _TERA_HOUR:.2g} hours at 1 TFLOP/s",
        f"time of a step: {seconds(cost.step_s)} (arithmetic {seconds(cost.compute_s)}, messages "
        f"{seconds(cost.messages_s)}, optimizer {seconds(cost.optimizer_s)})",
        f"time of a run: {seconds(duration.total_s)}, of which evaluations "
        f"{seconds(duration.evaluation_s)}; {duration.worker_hours:.2g} worker-hours, without "
        "start-up and checkpoints",
    ]
    search = plan.config.search
    if search is not None:
        trials = trial_count(search)
        whole = trials * duration.worker_hours
        lines.append(f"a sweep of {trials} trials: at most {whole:.2g} worker-hours")
        if plan.asha_share < 1:
            lines[-1] += (
                f", at least {whole * plan.asha_share:.2g} where {search.scheduler.name} stops "  # type: ignore[union-attr]
                f"all that it can ({plan.asha_share:.0%})"
            )
    return lines


def _data(plan: Plan) -> list[str]:
    report = plan.report
    sources = [
        f"  {name}: {source.name}, {source.usable:,} of {source.rows:,} rows usable, "
        f"{source.label_tokens:,} of {source.tokens:,} tokens carry loss, longest row "
        f"{source.longest:,}, cut {source.truncated:,}, dropped {source.dropped:,}"
        + "".join(f", {count:,} {cause}" for cause, count in source.bad.items())
        + "".join(f"\n    {fact}" for fact in facts(source))
        for name, source in report.sources.items()
    ]
    splits = ", ".join(f"{name} {split.examples:,}" for name, split in report.splits.items())
    twice = ", ".join(f"{pair} {count:,}" for pair, count in report.duplicates.items() if count)
    held = report.splits["train"].sources
    mix = ", ".join(
        f"{name} {quota:,} ({quota / held[name]:.2f} epochs)"
        for name, quota in plan.quotas.items()
        if name in held
    )
    return [
        "data:",
        *sources,
        *([f"  a pass of {sum(plan.quotas.values()):,} examples: {mix}"] if held else []),
        f"  splits: {splits}",
        f"  examples in two splits: {twice or 'none'}",
        *(f"  {name}: {pairs}" for name, pairs in report.pairs.items()),
    ]


def table(rows: list[Cells]) -> list[str]:
    """Lines with columns as wide as their widest cell; the last column is not padded."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  "
        + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
