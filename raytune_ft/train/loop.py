"""The training loop, read from top to bottom as the algorithm. Every method and layout uses it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch

from raytune_ft.config.train import TrainConfig
from raytune_ft.data.order import Indices, Order
from raytune_ft.data.split import TokenizedSplit
from raytune_ft.layout import checkpoint_path
from raytune_ft.model.methods import without_method
from raytune_ft.records import EvalMetrics, StepMetrics
from raytune_ft.train.checkpoint import Progress, Saver
from raytune_ft.train.engine import Engine
from raytune_ft.train.evaluation import evaluate
from raytune_ft.train.optim import learning_rate
from raytune_ft.train.report import Reporter, Reports
from raytune_ft.train.run_state import (
    Goal,
    Outcome,
    Schedule,
    after_evaluation,
    check_finite,
    exhausted,
    outcome,
)
from raytune_ft.train.watchdog import Beat, Heartbeat, unheard


def accumulate_gradients(
    engine: Engine,
    split: TokenizedSplit,
    indices: Indices,
    ask: Callable[[], tuple[bool, ...]] = tuple,
    beat: Beat = unheard,
) -> tuple[float, tuple[bool, ...]]:
    """Add the gradient of the objective's mean loss over `indices`.

    Returns that mean and, to each question that `ask` answers, whether any rank says yes, which
    costs nothing here. The sum of the losses is divided once, by the objective's count of the
    whole step on all ranks, which every rank knows beforehand.
    """
    strategy = engine.strategy
    count = engine.objective.count(split, indices) or 1  # nothing counts: the gradient is zero
    layout = engine.layout(split.lengths[indices].tolist())
    loss_sum = torch.zeros((), dtype=torch.float64)
    beat(0, len(layout))
    for number, rows in enumerate(layout, start=1):
        batch = engine.collate(split, indices, rows)
        with strategy.accumulate(last=number == len(layout)):
            loss = engine.training_losses(batch).sum()
            beat(number - 0.5, len(layout))
            strategy.backward(loss / count)
        loss_sum += loss.detach().double().cpu()
        beat(number, len(layout))
    sums = torch.tensor([loss_sum.item(), *map(float, ask())], dtype=torch.float64)
    total, *votes = strategy.sum(sums.to(strategy.device)).tolist()
    return total / count, tuple(vote > 0 for vote in votes)


def train(
    engine: Engine,
    data: TokenizedSplit,
    order: Order,
    validation: TokenizedSplit,
    settings: TrainConfig,
    schedule: Schedule,
    seed: int,
    goal: Goal,
    progress: Progress,
    saver: Saver,
    log: Reporter,
    reporter: Reporter,
    should_stop: Callable[[], bool],
    heart: Heartbeat,
) -> tuple[Outcome, Progress]:
    """Train from `progress` to the end of the budget, an early stop or a request to stop.

    `log` hears of everything at once; `reporter` hears of an evaluation when the checkpoint that
    it earned is committed, so that whoever stops the run then finds it whole. Training goes on
    meanwhile, and all ranks report after the same step.

    Raises:
        Diverged: the loss, the gradient or an evaluation is not finite.
    """
    started = time.perf_counter() - progress.wall_s
    if progress.base is None:
        with without_method(engine.model):
            base = _measure(engine, validation, 0, 0, heart)
        progress = replace(progress, base=base)
        log.evaluation(base, None)
        reporter.evaluation(base, None)

    stopped = False
    with Reports(saver, reporter) as reports:
        while (
            progress.step < schedule.total_steps
            and not stopped
            and not exhausted(progress, settings)
        ):
            step_started = time.perf_counter()
            seen, step = progress.examples, progress.step + 1
            heart.enter(f"step {step}")
            examples = schedule.examples_after(step)
            indices = order.indices(seen, examples - seen)
            _seed_noise(seed, step, engine.strategy.rank)

            loss, (stopped, writing) = accumulate_gradients(
                engine, data, indices, lambda: (should_stop(), saver.busy), heart.beat
            )
            lr = learning_rate(settings, progress.step, schedule.total_steps)
            grad_norm = engine.strategy.step(lr, settings.max_grad_norm)
            if not writing:
                reports.release()
            check_finite(step, loss, grad_norm)

            now = time.perf_counter()
            progress = replace(progress, step=step, examples=examples, wall_s=now - started)
            tokens = int(data.lengths[indices].sum())
            metrics = StepMetrics(
                step=step,
                examples=examples,
                tokens=tokens,
                label_tokens=int(data.label_counts[indices].sum()),
                loss=loss,
                lr=lr,
                grad_norm=grad_norm,
                tokens_per_s=tokens / (now - step_started),
                wall_s=progress.wall_s,
            )
            log.step(metrics)
            reporter.step(metrics)

            evaluation, is_best = None, False
            if schedule.due(step, schedule.eval_every):
                evaluation = _measure(engine, validation, step, examples, heart)
                is_best = goal.improves(evaluation, progress.best)
                progress = after_evaluation(progress, evaluation, settings, goal)
                log.evaluation(evaluation, None)
            ending = stopped or exhausted(progress, settings)
            if is_best or ending or schedule.save_due(step):
                heart.enter(f"checkpoint of step {step}")
                reports.release()
                saver.save(progress, evaluation)
            if evaluation is not None:
                reports.hold(evaluation, checkpoint_path(step) if is_best else None)
        heart.enter("last checkpoint")
    return outcome(progress, settings, schedule), progress


def _measure(
    engine: Engine, validation: TokenizedSplit, step: int, examples: int, heart: Heartbeat
) -> EvalMetrics:
    heart.enter(f"evaluation after step {step}")
    return evaluate(engine, validation, heart.beat).after(step, examples)


def _seed_noise(seed: int, step: int, rank: int) -> None:
    """Dropout is a function of seed, step and rank, so that a resumed run draws the same."""
    torch.manual_seed(int(np.random.SeedSequence([seed, step, rank]).generate_state(1)[0]))
