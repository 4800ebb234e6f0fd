"""`raytune-ft plan`: what a config would do, without doing it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from raytune_ft.app import placed, prepare
from raytune_ft.config.load import choose_strategy, dump_yaml, expand_env, load_config
from raytune_ft.config.rules import check_grace
from raytune_ft.config.schema import Config, LoraMethod
from raytune_ft.rundir import probe_storage, run_path

if TYPE_CHECKING:
    from raytune_ft.data.report import DataReport

LOSS_BEGINS, LOSS_ENDS = "[[", "]]"
_FLOAT32, _MOMENTS = 4, 2
_TERA_HOUR = 1e12 * 3600


@dataclass(frozen=True)
class Memory:
    """Bytes that one worker holds throughout a run. Activations come on top."""

    parameters: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.parameters + self.gradients + self.optimizer


@dataclass(frozen=True)
class Plan:
    """Everything that `plan` prints."""

    config: Config
    strategy: tuple[str, str]
    total_parameters: int
    trained_parameters: int
    memory: Memory
    report: DataReport
    example: str
    train_examples: int
    budget_examples: int
    steps: int
    tokens: int
    flops: float
    notes: tuple[str, ...]


def make_plan(file: Path, overrides: Sequence[str], tell: Callable[[str], None]) -> Plan:
    """Validate, resolve, tokenise, and count; raises what `train` or `sweep` would."""
    written = load_config(file, overrides, tell)
    with placed(written) as config:
        probe_storage(run_path(config).parent)
    expanded = expand_env(config)
    data = prepare(expanded, tell)

    from raytune_ft.data.examples import describe_example
    from raytune_ft.model.build import count_parameters, load_tokenizer
    from raytune_ft.train.optim import total_examples

    total, trained = count_parameters(expanded.model, expanded.method)
    budget = total_examples(config.train, len(data.train))
    tokens = round(budget * len(data.train.input_ids) / len(data.train))
    if config.search is not None:
        check_grace(config.search, budget)
    pieces = describe_example(data.train, 0, load_tokenizer(expanded.model))
    shown = [f"{LOSS_BEGINS}{text}{LOSS_ENDS}" if loss else text for text, loss in pieces]
    return Plan(
        config=config,
        strategy=(config.parallel.strategy, choose_strategy(written)[1]),
        total_parameters=total,
        trained_parameters=trained,
        memory=estimate_memory(config, total, trained),
        report=data.report,
        example="".join(shown),
        train_examples=len(data.train),
        budget_examples=budget,
        steps=-(-budget // config.train.batch_size),
        tokens=tokens,
        flops=estimate_flops(total, trained, tokens),
        notes=_notes(config),
    )


def estimate_memory(config: Config, total: int, trained: int) -> Memory:
    """What AdamW needs: trained weights, gradients and two moments in float32, the rest frozen.

    Under fsdp each worker holds its share.
    """
    dtype = config.train.precision if config.model.dtype == "auto" else config.model.dtype
    frozen_bytes = {"bfloat16": 2, "float32": 4, "float64": 8}[dtype]
    master_bytes = 8 if config.train.precision == "float64" else _FLOAT32
    share = config.parallel.max_workers if config.parallel.strategy == "fsdp" else 1
    return Memory(
        parameters=((total - trained) * frozen_bytes + trained * master_bytes) // share,
        gradients=trained * master_bytes // share,
        optimizer=_MOMENTS * trained * master_bytes // share,
    )


def estimate_flops(total: int, trained: int, tokens: int) -> float:
    """Of the matrix products with weights: two a weight and token in the forward pass, two in the
    backward pass through it and two for its own gradient if it moves (arXiv 2001.08361).

    Attention scores and evaluations come on top; an embedding is counted, and is only looked up.
    """
    return (4.0 * total + 2.0 * trained) * tokens


def _notes(config: Config) -> tuple[str, ...]:
    notes = []
    if isinstance(config.method, LoraMethod) and config.method.dropout > 0:
        notes.append(
            f"method.dropout={config.method.dropout} draws noise: the run is reproducible with "
            "this number of workers and this packing only"
        )
    if run_path(config).exists():
        notes.append(f"{run_path(config)} exists: write --resume to continue it, or another name")
    if config.data.test is None:
        notes.append("without data.test, promotion measures on validation, which chose the model")
    return tuple(notes)


def describe(plan: Plan) -> str:
    """The plan as text."""
    size = _bytes
    memory, report = plan.memory, plan.report
    sources = [
        f"  {name}: {source.name}, {source.usable:,} of {source.rows:,} rows usable, "
        f"{source.label_tokens:,} of {source.tokens:,} tokens carry loss, longest row "
        f"{source.longest:,}, cut {source.truncated:,}, dropped {source.dropped:,}"
        + "".join(f", {count:,} {cause}" for cause, count in source.bad.items())
        for name, source in report.sources.items()
    ]
    splits = ", ".join(f"{name} {split.examples:,}" for name, split in report.splits.items())
    twice = ", ".join(f"{pair} {count:,}" for pair, count in report.duplicates.items() if count)
    share = plan.trained_parameters / plan.total_parameters
    lines = [
        "config, resolved:",
        *("  " + line for line in dump_yaml(plan.config).rstrip().splitlines()),
        "",
        f"strategy: {plan.strategy[0]} ({plan.strategy[1]})",
        f"parameters: {plan.total_parameters:,}, of which {plan.trained_parameters:,} move "
        f"({share:.2%})",
        f"memory of a worker: {size(memory.total)} (parameters {size(memory.parameters)}, "
        f"gradients {size(memory.gradients)}, optimizer {size(memory.optimizer)}), and activations",
        f"budget: {plan.budget_examples:,} examples in {plan.steps:,} steps",
        f"compute of a run: {plan.tokens:,} tokens, about {plan.flops:.2g} FLOP without attention "
        f"scores and evaluations, {plan.flops / _TERA_HOUR:.2g} hours at 1 TFLOP/s",
        "data:",
        *sources,
        f"  splits: {splits}",
        f"  examples in two splits: {twice or 'none'}",
        "",
        f"the first training example; {LOSS_BEGINS}...{LOSS_ENDS} carries loss:",
        *("  " + line for line in plan.example.splitlines()),
    ]
    if notes := [*report.notes, *plan.notes]:
        lines += ["", "notes:", *(f"  {note}" for note in notes)]
    return "\n".join(lines)


def _bytes(count: int) -> str:
    size, unit = float(count), "bytes"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if size < 1024:
            break
        size, unit = size / 1024, larger
    return f"{size:,.0f} {unit}" if unit == "bytes" else f"{size:,.1f} {unit}"
