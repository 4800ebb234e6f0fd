"""Learning rates against the library's schedules, and what a budget amounts to."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

from raytune_ft.config.schema import ParallelConfig
from raytune_ft.config.train import TrainConfig
from raytune_ft.strategy.single import Single
from raytune_ft.train.optim import build_optimizer, learning_rate, total_examples
from raytune_ft.train.run_state import Schedule

LIBRARY: dict[str, Any] = {
    "linear": get_linear_schedule_with_warmup,
    "cosine": get_cosine_schedule_with_warmup,
}


@pytest.mark.parametrize("name", LIBRARY)
def test_schedules_of_the_library(name: str) -> None:
    train = TrainConfig(lr=0.5, lr_schedule=name)  # type: ignore[arg-type]
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    schedule = LIBRARY[name](optimizer, 0, 30)
    for step in range(30):
        assert learning_rate(train, step, 30) == pytest.approx(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()


def test_warm_up_reaches_the_peak_and_wastes_no_step() -> None:
    train = TrainConfig(lr=1.0, lr_schedule="constant", warmup_fraction=0.4)
    rates = [learning_rate(train, step, 10) for step in range(10)]
    assert rates == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1, 1])


def test_budget() -> None:
    assert total_examples(TrainConfig(), 100) == 100
    assert total_examples(TrainConfig(epochs=2.5), 100) == 250
    assert total_examples(TrainConfig(max_examples=30), 100) == 30
    assert total_examples(TrainConfig(epochs=1, max_examples=30), 100) == 30
    assert total_examples(TrainConfig(epochs=0.2, max_examples=30), 100) == 20


def test_the_last_step_takes_what_remains() -> None:
    train = TrainConfig(batch_size=8, max_examples=20, eval_every_examples=16)
    schedule = Schedule.of(train, available=100, save_every=100)
    assert schedule.total_steps == 3
    assert [schedule.examples_after(step) for step in (1, 2, 3)] == [8, 16, 20]
    assert [schedule.due(step, schedule.eval_every) for step in (1, 2, 3)] == [False, True, True]
    assert [schedule.save_due(step) for step in (1, 2, 3)] == [False, False, True]
    assert [schedule.is_on_the_way(2, 16), schedule.is_on_the_way(2, 20)] == [True, False]


def test_a_checkpoint_before_a_partial_last_step_where_the_budget_may_grow() -> None:
    train = TrainConfig(batch_size=8, max_examples=20, lr_schedule="constant")
    schedule = Schedule.of(train, available=100, save_every=100)
    assert [schedule.save_due(step) for step in (1, 2, 3)] == [False, True, True]


def test_norms_and_biases_do_not_decay() -> None:
    layer = torch.nn.Linear(2, 2)
    groups = build_optimizer(
        dict(layer.named_parameters()), TrainConfig(weight_decay=0.1)
    ).param_groups
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert decay == {id(layer.weight): 0.1, id(layer.bias): 0.0}


def test_a_resumed_optimizer_steps_on_the_device_of_its_weights() -> None:
    """A fused step wants the count of steps there."""
    strategy = Single(ParallelConfig(), "float32")
    with FakeTensorMode():
        parameter = torch.nn.Parameter(torch.zeros(3, 2, device="cuda"))
        strategy.optimizer = build_optimizer({"weight": parameter}, TrainConfig())
        strategy.start_from(5)
        parameter.grad = torch.ones_like(parameter)
        strategy.optimizer.step()
    state = strategy.optimizer.state[parameter]
    assert {key: each.device.type for key, each in state.items()} == dict.fromkeys(
        ("step", "exp_avg", "exp_avg_sq"), "cuda"
    )


def test_the_fused_step_is_that_of_plain_adamw() -> None:
    drawn = torch.randn(20, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    train = TrainConfig(weight_decay=0.1, adam_beta2=0.99)
    ours, plain = torch.nn.Parameter(drawn.clone()), torch.nn.Parameter(drawn.clone())
    fused = build_optimizer({"weight": ours}, train)
    loop = torch.optim.AdamW(
        [plain],
        train.lr,
        (train.adam_beta1, train.adam_beta2),
        train.adam_epsilon,
        weight_decay=0.1,
        foreach=False,
    )
    for _ in range(20):
        ours.grad, plain.grad = ours.detach().sin(), plain.detach().sin()
        fused.step()
        loop.step()
    assert fused.defaults["fused"]
    assert (ours - plain).abs().max() < 1e-12
