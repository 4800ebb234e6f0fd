"""From a built model to an runner, and from a run's checkpoints to the one it goes on from."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from raytune_ft.checkpoints.store import CheckpointStore
from raytune_ft.config.data import CurriculumConfig
from raytune_ft.config.execution import variants
from raytune_ft.config.load import holds_base
from raytune_ft.config.objectives import OBJECTIVES, figures
from raytune_ft.config.schema import Config
from raytune_ft.config.train import TrainConfig
from raytune_ft.data.batch import FREELY, Apart, MicroBatch
from raytune_ft.data.order import Curriculum, Members, Numbers, Order, members_of, quotas_of, ranked
from raytune_ft.data.prepare import use_chat_template
from raytune_ft.data.prepared import PreparedData
from raytune_ft.data.report import DataReport
from raytune_ft.data.split import TokenizedSplit
from raytune_ft.errors import CheckpointError, ConfigError, ModelError, RunFailed
from raytune_ft.files import write_json_atomic
from raytune_ft.layout import CHECKPOINTS, FIRST_ANSWERS, FORECAST
from raytune_ft.model.attention import Varlen, attend_by_example, has_varlen, takes_segments
from raytune_ft.model.checkpointing import checkpoint_activations, choose_checkpointing
from raytune_ft.model.critic import add_critic, critic_weights
from raytune_ft.model.experts import expert_notes
from raytune_ft.model.export import Exporter
from raytune_ft.model.heads import Head, Place, reading
from raytune_ft.model.hub import teacher_model
from raytune_ft.model.lengths import apart_of, notes_of, thresholds_of, usable_positions
from raytune_ft.model.load import load_model_config, load_tokenizer, pad_token
from raytune_ft.model.meta import Built
from raytune_ft.model.methods import trained_parameters, without_method
from raytune_ft.model.methods.base import ParamGroup
from raytune_ft.model.methods.hooks import attached, virtual_tokens
from raytune_ft.model.objectives import Objective, TeacherOf, TokenObjective
from raytune_ft.model.objectives.tokens import block_rows
from raytune_ft.model.probe import LENGTHS, Probe, returns_its_head, same_of_one
from raytune_ft.model.routers import balance_of, router_notes
from raytune_ft.model.sampling import stop_tokens
from raytune_ft.records import Progress
from raytune_ft.rewards.pool import started
from raytune_ft.rundir import RunSpec
from raytune_ft.strategy import OptimizerOf, Strategy
from raytune_ft.train.checkpoint import Holder, Saver, load_state
from raytune_ft.train.copies import Copies, Sampler
from raytune_ft.train.distill import check_size, frozen_runner, teacher_of
from raytune_ft.train.material import Given, Material
from raytune_ft.train.model_runner import ModelRunner, choose_micro_tokens
from raytune_ft.train.optim import total_examples
from raytune_ft.train.report import Reporter
from raytune_ft.train.rollouts import Rolled, Watched, rewards_of
from raytune_ft.train.run_state import RunState, Schedule
from raytune_ft.train.speaker import Speaker, Voice
from raytune_ft.train.trackers import Log
from raytune_ft.train.usage import Usage
from raytune_ft.train.watchdog import Heartbeat


def plain_order(config: Config, split: TokenizedSplit) -> Order:
    """The order of the mixture over the training split, without a curriculum.

    Raises:
        ConfigError: a source gets no example.
    """
    quotas = quotas_of(config.data, split)
    return Order(config.seed, members_of(split, len(quotas)), quotas)


def order_of(config: Config, data: PreparedData) -> Order:
    """The order of a run's training examples.

    Raises:
        ConfigError: see `plain_order`.
        RunFailed: the curriculum needs losses of the base, which were not measured.
    """
    plain, settings = plain_order(config, data.train), config.data.curriculum
    if settings is None:
        return plain
    total = total_examples(config.train, len(plain))
    found = _curriculum(settings, plain.members, _difficulty(settings, data), total)
    return Order(plain.seed, plain.members, plain.quotas, found)


def _curriculum(
    settings: CurriculumConfig, members: tuple[Members, ...], difficulty: Numbers, total: int
) -> Curriculum:
    return Curriculum(
        ranked(members, difficulty, settings.order == "hard_first"),
        settings.schedule,
        settings.start,
        round(settings.until * total),
    )


def _difficulty(settings: CurriculumConfig, data: PreparedData) -> Numbers:
    """The difficulty `[n]` of the training examples."""
    if settings.by == "length":
        return data.train.lengths.astype(np.float64)
    if settings.by == "column":
        return data.train.columns["difficulty"][:, 0].astype(np.float64)
    if data.base_loss is None:
        raise RunFailed(f"{data.path} has no losses of the base, which the curriculum needs")
    return data.base_loss.astype(np.float64)


def head_of(config: Config, report: DataReport) -> Head | None:
    """The task head that the model is built with, None where it predicts tokens."""
    if report.problem is None:
        return head_before(config)
    return Head(report.problem, report.labels, config.seed)


def head_before(config: Config) -> Head | None:
    """The task head before the data are read, with two labels where none are written. That of a
    reward model does not depend on the data.
    """
    facts = OBJECTIVES[config.train.objective]
    if not facts.head:
        return None
    if facts.pairs:
        return Head("regression", ("reward",), config.seed)
    return Head(config.data.problem, tuple(config.data.labels or ("0", "1")), config.seed)


def with_critic(model: nn.Module, train: TrainConfig) -> dict[str, ParamGroup]:
    """Give a built model the critic that its objective needs. The optimizer's settings of its
    weights, none without one.

    Raises:
        ModelError: the model cannot have one.
    """
    if not OBJECTIVES[train.objective].critic:
        return {}
    add_critic(model, train.precision, train.ppo.detach_values)
    return dict.fromkeys(critic_weights(model), ParamGroup(train.ppo.value_lr_ratio))


def check_objective(config: Config, data: PreparedData) -> None:
    """Raises ConfigError where keys of the objective do not fit the data."""
    evaluation_objective(config.train, data)
    check_size(config, data)


def build_objective(config: Config, data: PreparedData, strategy: Strategy) -> Objective:
    """The objective of this run.

    Raises:
        ConfigError: its keys do not fit the data.
        ModelError: its teacher cannot be loaded, or has another vocabulary.
    """
    return _objective(config.train, data, partial(teacher_of, config, data, strategy))


def evaluation_objective(train: TrainConfig, data: PreparedData) -> Objective:
    """The same without its teacher, which evaluations do not ask. Raises ConfigError."""

    def absent(batch: MicroBatch) -> torch.Tensor:
        raise AssertionError("an evaluation asked for the teacher")

    return _objective(train, data, lambda: absent)


def _objective(train: TrainConfig, data: PreparedData, teacher_of: TeacherOf) -> Objective:
    built: Objective = OBJECTIVES[train.objective].implementation()(train, data, teacher_of)
    return built


def check_vocabulary(
    config: Config, shapes: Any, data: PreparedData, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Raises ModelError where the data has a token without an embedding in the model."""
    rows: int = shapes.get_input_embeddings().num_embeddings
    largest = max(int(split.input_ids.max(initial=0)) for split in data.splits)
    if largest >= rows:
        token = tokenizer.convert_ids_to_tokens(largest)
        raise ModelError(
            f"model.path={config.model.path}",
            f"has embeddings for {rows:,} tokens, but its tokenizer writes {token!r} in the data "
            f"as token {largest}",
            "use the tokenizer that belongs to the model, or resize the model's embeddings",
        )


def check_lengths(config: Config, shapes: nn.Module, data: PreparedData) -> None:
    """Raises ConfigError where a row, with the virtual tokens of the method before it, exceeds the
    model's positions. In a search, every method of the space is checked.
    """
    positions, longest = usable_positions(shapes), extent_of(config, data)[0][1]
    virtual = max(one.method.virtual_tokens for one in variants(config))
    if positions is None or longest + virtual <= positions:
        return
    said = longest - data.extent[1]
    if said:
        raise ConfigError(
            f"train.rollout.max_completion_length={said}",
            f"after prompts of up to {longest - said + virtual} tokens exceeds the model's "
            f"{positions} positions",
            f"write at most {positions - virtual - longest + said}"
            if longest - said + virtual < positions
            else "write a smaller data.max_length",
        )
    if longest < positions:
        raise ConfigError(
            f"method.tokens={virtual}",
            f"plus rows of up to {longest} tokens exceeds the model's {positions} positions",
            f"write at most {positions - longest}, or a smaller data.max_length",
        )
    raise ConfigError(
        f"data.max_length={config.data.max_length}",
        f"allows rows of {longest} tokens, but the model has {positions} positions",
        f"write at most {max(1, positions - virtual)}",
    )


def check_pairs(config: Config, data: PreparedData) -> None:
    """Raises ConfigError where the answers of a pair have lengths that the model keeps apart, since
    both are needed in one forward pass.
    """
    rollouts = OBJECTIVES[config.train.objective].rollouts
    if max(data.train.parts, rollouts) == 1:
        return
    apart = apart_of(load_model_config(config.model, head_of(config, data.report)))
    extent, _ = extent_of(config, data)
    if rollouts and len({apart.group(length) for length in extent}) > 1:
        raise ConfigError(
            f"train.objective={config.train.objective}",
            "compares answers of different lengths in a pass, and the model computes rows of up to "
            f"{min((*apart.thresholds, apart.each_above or extent[1]))} tokens "
            "differently beside longer ones",
            "write train.objective: grpo",
        )
    for split in data.splits if apart != FREELY else ():
        for lengths in np.diff(split.part_offsets).reshape(-1, split.parts).tolist():
            if len({apart.group(length) for length in lengths}) > 1:
                bound = max(each for each in (*apart.thresholds, apart.each_above) if each)
                raise ConfigError(
                    f"data.max_length={config.data.max_length}",
                    f"allows answers of {lengths[0]} and {lengths[1]} tokens in a pair, and the "
                    f"model computes rows of up to {bound} tokens differently beside longer ones",
                    f"write data.max_length: {bound}",
                )


def where_to_resume(store: CheckpointStore, schedule: Schedule, strategy: Strategy) -> Path | None:
    """The newest sound checkpoint through which a run of this budget passes.

    Rank 0 lists the checkpoints, since hosts may not see the same folder at the same moment. Then
    every rank verifies a share of the files: a large checkpoint takes long to read.
    """
    names = [
        path.name
        for path, manifest in reversed(store.list())
        if strategy.rank == 0 and schedule.is_on_the_way(manifest.step, manifest.examples)
    ]
    for name in strategy.from_rank0(names):
        damaged = torch.zeros(1, device=strategy.device)
        try:
            store.verify(store.root / name, strategy.rank, strategy.world_size)
        except CheckpointError as error:
            logging.getLogger(__name__).warning(f"checkpoint {name} is skipped: {error}")
            damaged += 1
        if strategy.sum(damaged).item() == 0:
            return store.root / name
    return None


def build_run_state(
    spec: RunSpec,
    data: PreparedData,
    holder: Holder,
    names: list[str],
    exporter: Exporter,
    strategy: Strategy,
    reporter: Reporter,
    heart: Heartbeat,
    pool: Executor,
    material: Material | None = None,
) -> RunState:
    """A run at its newest sound checkpoint, or at its beginning; called on every rank.

    `holder` has the trained weights `names` and their moments, into which the checkpoint is loaded;
    `material` goes on from it too.

    Raises:
        ConfigError: see `order_of`.
        CheckpointError: the checkpoint is of another model or method, or a rank cannot read it.
    """
    config = spec.config
    order = order_of(config, data)
    schedule = Schedule.of(
        config.train, len(order), config.checkpoint.every_examples, config.data.curriculum
    )
    store = CheckpointStore(spec.run_dir / CHECKPOINTS)
    checkpoint = where_to_resume(store, schedule, strategy)
    channel = holder.side_channel()
    progress = load_state(checkpoint, holder, names, channel) if checkpoint else Progress()
    state = None if material is None else material.state
    saver = Saver(spec, store, holder, names, exporter, channel, pool, heart.alive, state)
    resume_step = progress.step if checkpoint else None
    if material is not None and checkpoint:
        material.restore(checkpoint, progress.step)
    log = Log(spec, resume_step) if strategy.rank == 0 else None
    if log and spec.forecast is not None:
        write_json_atomic(spec.run_dir / FORECAST, spec.forecast)
    usage = Usage(strategy.device, strategy.world_size, spec.forecast)
    return RunState(spec, order, schedule, progress, saver, log, reporter, heart, usage)


def extent_of(config: Config, data: PreparedData) -> tuple[tuple[int, int], int]:
    """The lengths of the shortest and longest sequence that the model sees, and the tokens of the
    longest example; what a model says to a prompt counts.
    """
    (shortest, longest), widest = data.extent, data.widest
    rollouts = OBJECTIVES[config.train.objective].rollouts
    if not rollouts:
        return (shortest, longest), widest
    said = config.train.rollout.max_completion_length
    return (shortest + 1, longest + said), (widest + said) * rollouts


@contextmanager
def build_material(
    runner: ModelRunner,
    data: PreparedData,
    spec: RunSpec,
    heart: Heartbeat,
    exporter: Exporter,
    sampler: Sampler | None,
) -> Iterator[Material]:
    """What a run is trained on. Processes of rewards end with the context. `sampler` is there where
    copies of the model sample, which get what `exporter` writes.

    Raises:
        ConfigError: a reward cannot be used.
        ModelError: the model before training, which a KL term needs, cannot be loaded.
    """
    config, reference, copies = spec.config, None, None
    with build_voice(config, data, runner.strategy) as voice:
        if voice is not None and holds_base(config):
            reference = frozen_runner(config.model, config, runner.strategy)
        if voice is not None and config.train.rollout.on_vllm:
            assert sampler is not None
            strategy = runner.strategy
            copies = Copies(sampler, exporter, runner.names, strategy, strategy.side_channel())
        yield material_of(runner, data, spec, heart, voice, reference, copies)


@contextmanager
def build_voice(config: Config, data: PreparedData, strategy: Strategy) -> Iterator[Voice | None]:
    """How the models of such runs answer, None where they are asked nothing; called on every rank.
    Processes of rewards end with the context.

    Raises:
        ConfigError: a reward cannot be used.
    """
    if not OBJECTIVES[config.train.objective].rollouts and not config.train.watch:
        yield None
        return
    tokenizer = load_tokenizer(config.model)
    use_chat_template(tokenizer, config.data)
    ends = stop_tokens(tokenizer, config.model, data.report)
    with started(rewards_of(config, data.path)) as rewards:
        temperature, channel = config.train.rollout.temperature, strategy.side_channel()
        yield Voice(tokenizer, ends, temperature, rewards, channel)


def material_of(
    runner: ModelRunner,
    data: PreparedData,
    spec: RunSpec,
    heart: Heartbeat,
    voice: Voice | None,
    reference: ModelRunner | None = None,
    copies: Copies | None = None,
) -> Material:
    """What a run is trained on; `reference` and `copies` as in `Speaker`."""
    config = spec.config
    if voice is None:
        return Given(runner, data)
    first = spec.run_dir / FIRST_ANSWERS
    speaker = Speaker(runner, config, voice, heart, reference, copies, first)
    if OBJECTIVES[config.train.objective].rollouts:
        return Rolled(speaker, data, config, spec.run_dir)
    return Watched(runner, data, speaker)


def build_runner(
    built: Built,
    config: Config,
    strategy: Strategy,
    optimizer_of: OptimizerOf,
    objective: Objective | None = None,
    extent: tuple[int, int] = (1, 1),
    widest: int = 0,
) -> ModelRunner:
    """Lay the model out as the strategy does, then probe whether packing is exact on it.

    `extent`: the lengths of the shortest and longest example. `widest`: of a row, where that may be
    more.

    Raises:
        ConfigError: `data.packing: true`, but packing would change the numbers.
        ModelError: the model is not causal.
    """
    model = built.model
    head = model.get_output_embeddings()  # type: ignore[operator]
    vocabulary = model.get_input_embeddings().num_embeddings  # type: ignore[operator]
    names = list(trained_parameters(model))
    checkpoint_activations(model, choose_checkpointing(config.parallel.activation_checkpointing))
    wrapped = strategy.prepare(model, optimizer_of)
    if built.weights is not None:
        built.weights.fill({n: strategy.part(n, p.detach()) for n, p in model.named_parameters()})
    runner = ModelRunner(
        model=model,
        wrapped=wrapped,
        head=head,
        names=names,
        strategy=strategy,
        precision=config.train.precision,
        pad_token=min(pad_token(load_tokenizer(config.model)), vocabulary - 1),
        micro_tokens=choose_micro_tokens(config.train.micro_tokens, strategy.device),
        packing=False,
        by_example=config.model.attention == "auto" and attend_by_example(model, True),
        flash=takes_segments(model),
        notes=(
            *built.notes,
            *notes_of(model.config, extent),
            *router_notes(model),
            *expert_notes(model),
        ),
        objective=objective or TokenObjective(),
        figures=figures(config.train.objective, config.data.problem, trained=True),
        noise=config.train.neftune_alpha,
        apart=_apart(config, model),
        balance=balance_of(model),
        row_limit=_row_limit(model, max(extent[1], widest)),
        without_method=partial(without_method, model),
    )
    if runner.objective.of_tokens:
        _check_causal(runner, vocabulary, config)
        runner = _in_blocks(runner, vocabulary)
    else:
        runner = _reading_examples(runner, vocabulary)
    if runner.by_example and not _attends_as_plain(runner, vocabulary):
        runner = replace(runner, by_example=attend_by_example(model, False))
    if runner.flash and not _attends_as_plain(runner, vocabulary):
        runner = replace(runner, flash=False)
    if runner.by_example and has_varlen(strategy.device) and runner.precision == "bfloat16":
        runner = _with_varlen(runner, vocabulary, extent[1])
    runner = _kept_apart(runner, vocabulary, extent[1])
    if config.data.packing is False:
        return runner
    reason = _against_packing(runner, vocabulary, extent[1], widest)
    if reason is not None and runner.by_example:
        runner = replace(runner, by_example=attend_by_example(model, False), varlen=None)
        reason = _against_packing(runner, vocabulary, extent[1], widest)
    if reason is not None and runner.flash:
        runner = replace(runner, flash=False)
        reason = _against_packing(runner, vocabulary, extent[1], widest)
    if reason is None:
        return _sharing(replace(runner, packing=True), vocabulary, config, extent[1], widest)
    if config.data.packing is True:
        raise ConfigError("data.packing=true", f"would change the numbers: {reason}", "write auto")
    without = f"data.packing: auto does not pack, because {reason}"
    return replace(runner, notes=(*runner.notes, without))


def _row_limit(model: nn.Module, longest: int) -> int:
    """The longest row that is on the same side of every length that the model's configuration names
    as the longest example, so that packing need not be tried beyond it.
    """
    longest += virtual_tokens(model)
    above = [each for each in thresholds_of(model.config, sys.maxsize) if each >= longest]
    return min(above, default=sys.maxsize)


def _apart(config: Config, model: nn.Module) -> Apart:
    """What the model keeps apart, and its teacher, which is given the same micro-batches."""
    found = apart_of(model.config)
    return (
        found
        if config.train.kd is None
        else found | apart_of(load_model_config(teacher_model(config)))
    )


def _with_varlen(runner: ModelRunner, vocabulary: int, longest: int) -> ModelRunner:
    """The same with attention through `varlen_attn`, where every layer takes it and computes what
    it does otherwise, also in a row that is longer than the model's windows.
    """
    strategy, found = runner.strategy, replace(runner, varlen=Varlen())
    assert found.varlen is not None
    config = runner.model.config.get_text_config()  # type: ignore[operator,union-attr]
    window = getattr(config, "sliding_window", None) or 0
    lengths = {LENGTHS[0], min(window + LENGTHS[0], longest)} if window < longest else {LENGTHS[0]}
    same = [_computes_the_same(found, runner, vocabulary, length) for length in sorted(lengths)]
    reason = found.varlen.refused or (None if all(same) else "it computes something else")
    reason = strategy.from_rank0(reason)
    if reason is None:
        return found
    note = f"attention gathers the tokens of each example, since torch's varlen kernel: {reason}"
    return replace(runner, notes=(*runner.notes, note))


def _attends_as_plain(runner: ModelRunner, vocabulary: int) -> bool:
    """Whether attention by example computes for one example what transformers' attention does,
    which may add a bias of the model to the scores.
    """
    plain = replace(runner, by_example=False, flash=False)
    return runner.strategy.from_rank0(_computes_the_same(runner, plain, vocabulary, LENGTHS[0]))


def _computes_the_same(one: ModelRunner, other: ModelRunner, vocabulary: int, length: int) -> bool:
    """Whether two ways to run a model give the same output for a document of that length."""
    of_tokens, virtual = one.objective.of_tokens, virtual_tokens(one.model)
    first, second = (each.logits if of_tokens else each.example_logits for each in (one, other))
    device = one.strategy.device
    return same_of_one(first, second, vocabulary, one.precision, device, virtual, length)


def _probe(runner: ModelRunner, vocabulary: int) -> Probe:
    """A probe of the logits of tokens, or of examples where the objective reads these."""

    def of_examples(batch: MicroBatch, keep_N: torch.Tensor) -> torch.Tensor:
        return runner.example_logits(batch)

    logits = runner.logits if runner.objective.of_tokens else of_examples
    device, virtual = runner.strategy.device, virtual_tokens(runner.model)
    return Probe(logits, vocabulary, runner.precision, device, virtual)


def _kept_apart(runner: ModelRunner, vocabulary: int, longest: int) -> ModelRunner:
    """The same, with equal lengths alone in a micro-batch where padding changes an example. It is
    tried with rows on both sides of each threshold of the configuration.
    """
    strategy, probe = runner.strategy, _probe(runner, vocabulary)
    for threshold in thresholds_of(runner.model.config, longest + probe.virtual):
        over = threshold + 1 - probe.virtual
        lengths = [longest, over, max(over - 1, 1), max(over // 2, 1)]
        if over > 1 and not strategy.from_rank0(probe.keeps_lengths(lengths, runner.apart)):
            note = (
                "rows of different lengths do not share a micro-batch, because the model computes "
                f"rows of up to {over - 1} tokens differently beside longer ones"
            )
            return replace(runner, apart=Apart(each_above=0), notes=(*runner.notes, note))
    return runner


def _against_packing(runner: ModelRunner, vocabulary: int, longest: int, widest: int) -> str | None:
    method, strategy = attached(runner.model), runner.strategy
    if method is not None and method.unpackable:
        return method.unpackable
    probe = _probe(runner, vocabulary)
    inner = _inner_thresholds(runner, max(longest, widest))
    return strategy.from_rank0(probe.against_packing(longest, inner))


def _inner_thresholds(runner: ModelRunner, longest: int) -> list[int]:
    """Lengths up to the longest row that the model's configuration names."""
    virtual = virtual_tokens(runner.model)
    found = thresholds_of(runner.model.config, longest + virtual)
    return [each - virtual for each in found if each - virtual > 1]


def _sharing(
    runner: ModelRunner, vocabulary: int, config: Config, longest: int, widest: int
) -> ModelRunner:
    """The same with prompts that a row holds once, where sequences of a step have prompts in common
    and nothing but attention looks at other tokens.

    Noise and routers see how often a prompt is there, and hooks of a method where it stands.
    """
    facts, model = OBJECTIVES[config.train.objective], runner.model
    able = runner.by_example and attached(model) is None and runner.balance is None
    noise = runner.noise is not None or getattr(config.method, "dropout", 0.0) > 0
    if not facts.of_answers or not able or noise:
        return runner
    inner = _inner_thresholds(runner, max(longest, widest))
    tried = _probe(replace(runner, shares=True), vocabulary)
    reason = runner.strategy.from_rank0(tried.against_packing(longest, inner, shared=True))
    return replace(runner, shares=reason is None)


def _check_causal(runner: ModelRunner, vocabulary: int, config: Config) -> None:
    if not runner.strategy.from_rank0(_probe(runner, vocabulary).is_causal()):
        raise ModelError(
            f"model.path={config.model.path}",
            "is not causal: a token sees the tokens that it has to predict",
            'use a decoder; a BERT becomes one by "is_decoder": true in its config.json',
        )


def _in_blocks(runner: ModelRunner, vocabulary: int) -> ModelRunner:
    """The same with the logits of a few label tokens at a time, where the model allows it."""
    if runner.head is None:
        return runner
    strategy, tried = runner.strategy, replace(runner, block=LENGTHS[0] // 2)
    asked = (vocabulary, strategy.device, virtual_tokens(runner.model))
    able = strategy.from_rank0(returns_its_head(tried.by_label, *asked))
    return replace(runner, block=block_rows(vocabulary) if able else None)


def _reading_examples(runner: ModelRunner, vocabulary: int) -> ModelRunner:
    """Find out which token of a row the head reads, by rows of one example."""
    places: list[Place] = ["first", "last", "row"]
    ways = {place: replace(runner, reading=reading(runner.model, place)) for place in places}

    def of(place: Place) -> Callable[[MicroBatch], torch.Tensor]:
        return lambda batch: ways[place].example_logits(batch)

    strategy = runner.strategy
    found = [
        place
        for place in places
        if strategy.from_rank0(
            same_of_one(of(place), of("row"), vocabulary, runner.precision, strategy.device)
        )
    ]
    return ways[found[0]]
