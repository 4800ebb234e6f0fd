"""The training loop, read from top to bottom as the algorithm. Every method and layout uses it."""

from __future__ import annotations

from contextlib import closing

import numpy as np
import torch
from torch import Tensor

from raytune_ft.strategy import Strategy
from raytune_ft.train.material import Material, Work
from raytune_ft.train.model_runner import ModelRunner, noisy_embeddings
from raytune_ft.train.run_state import RunState
from raytune_ft.train.stopping import Host
from raytune_ft.train.watchdog import Beat, no_beat


def train(
    runner: ModelRunner,
    material: Material,
    run: RunState,
    host: Host,
) -> None:
    """Train from where `run` stands to the end of its budget, an early stop or a request to leave.

    Raises:
        Diverged: the loss, the gradient or an evaluation is not finite.
        CheckpointError: a checkpoint could not be written.
    """
    strategy, config, heart = runner.strategy, run.spec.config, host.heart
    stopped = left = False
    steps = material.steps(run)
    with closing(steps), run.reporting():
        if run.progress.base is None:
            heart.enter("evaluation before training")
            with runner.without_method():
                run.begin(material.evaluate(heart.beat))
        while not (run.over or stopped or left):
            step = run.step
            heart.enter(f"step {step}")
            work = next(steps)
            _seed_noise(config.seed, step, strategy)

            loss_sum, count = accumulate_gradients(runner, work, heart.beat)
            votes = host.should_stop(), host.should_leave(), run.saver.busy
            loss, (stopped, left, saving) = _sum_and_vote(strategy, loss_sum, votes)
            grad_norm = strategy.step(run.lr, config.train.max_grad_norm)

            if not saving:
                run.release()
            scores = None
            if run.after_step(work, loss / count, grad_norm) and not left:
                heart.enter(f"evaluation after step {step}")
                scores = material.evaluate(heart.beat)
            run.after_evaluation(scores, stopped)


def accumulate_gradients(
    runner: ModelRunner, work: Work, beat: Beat = no_beat
) -> tuple[Tensor, float]:
    """Add the gradient of the objective's mean loss over a step, whatever its layout.

    The losses are divided once, by the objective's count over the whole step on all ranks, which
    every rank knows beforehand. Returns this rank's sum of losses and that count. A router loss is
    added to the gradient alone. The host does not wait for the device.
    """
    split, indices, batches = work.split, work.indices, work.batches
    strategy, objective = runner.strategy, runner.objective.over(split, indices, runner)
    count = objective.count(split, indices) or 1  # nothing counts: the gradient is zero
    loss_sum = torch.zeros((), dtype=torch.float64, device=strategy.device)
    beat(0, len(batches))
    for number, on_host in enumerate(batches, start=1):
        batch = on_host.to(strategy.device)
        with strategy.accumulate(last=number == len(batches)):
            with noisy_embeddings(runner.model, batch, runner.noise), runner.watched():
                loss = objective.losses(runner, batch).sum()
            beat(number - 0.5, len(batches))
            shares_Q = [1 / (len(indices) * split.parts)] * len(batch.spans)
            strategy.backward(loss / count + runner.balance_loss(batch, shares_Q))
        loss_sum += loss.detach().double()
        beat(number, len(batches))
    return loss_sum, count


def _sum_and_vote(
    strategy: Strategy, loss_sum: Tensor, votes: tuple[bool, ...]
) -> tuple[float, tuple[bool, ...]]:
    """The loss of all ranks and, for each vote, whether any rank says yes: one all-reduce a step.

    Ranks must stop, and report, after the same step; a signal or a slow disk reaches one of them.
    """
    mine = torch.cat([loss_sum.view(1), loss_sum.new_tensor(votes)])
    total, *yes = strategy.sum(mine).tolist()
    return total, tuple(count > 0 for count in yes)


def _seed_noise(seed: int, step: int, strategy: Strategy) -> None:
    """Dropout is a function of seed, step and rank, so that a resumed run draws the same.

    Seeds the generators that a step draws from; `torch.manual_seed` also records a call, with its
    stack, for every kind of device that is not here.
    """
    sequence = np.random.SeedSequence([seed, step, strategy.rank])
    number = int(sequence.generate_state(1)[0])
    torch.default_generator.manual_seed(number)
    if strategy.device.type == "cuda":
        torch.cuda.manual_seed(number)
