"""What `plan` says is what would happen."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import pytest

from raytune_ft.config.load import apply_overrides, load_config, resolve
from raytune_ft.config.schema import Config
from raytune_ft.errors import ConfigError, ModelError, StorageError
from raytune_ft.model.build import build_model, count_parameters
from raytune_ft.model.methods import trained_parameters
from raytune_ft.plan import describe, estimate_flops, estimate_memory, make_plan

ROOT = Path(__file__).parents[2]
QUICKSTART = ROOT / "jobs" / "quickstart.yaml"


@pytest.fixture
def config(monkeypatch: pytest.MonkeyPatch) -> Config:
    monkeypatch.chdir(ROOT)
    return resolve(load_config(QUICKSTART))


@pytest.mark.parametrize("change", [{}, {"method.name": "full"}, {"method.dora": True}])
def test_parameters_are_those_of_the_built_model(config: Config, change: dict[str, object]) -> None:
    config = apply_overrides(config, change)
    model = build_model(config.model, config.method, "float32", 0)
    total = sum(parameter.numel() for parameter in model.parameters())
    trained = sum(parameter.numel() for parameter in trained_parameters(model).values())
    assert count_parameters(config.model, config.method) == (total, trained)


def test_a_target_that_the_model_lacks_is_found_without_its_weights(config: Config) -> None:
    odd = apply_overrides(config, {"method.targets": ["q_prj"]})
    with pytest.raises(ModelError, match="q_prj names no layer"):
        count_parameters(odd.model, odd.method)


def test_memory_counts_moments_of_what_moves_and_shares_it_under_fsdp(config: Config) -> None:
    memory = estimate_memory(config, total=1000, trained=100)
    assert (memory.parameters, memory.gradients, memory.optimizer) == (4000, 400, 800)
    half = apply_overrides(config, {"train.precision": "bfloat16"})
    assert estimate_memory(half, 1000, 100).parameters == 900 * 2 + 100 * 4
    shared = apply_overrides(half, {"parallel.workers": 2, "parallel.strategy": "fsdp"})
    assert estimate_memory(shared, 1000, 100).total * 2 == estimate_memory(half, 1000, 100).total


def test_plan_shows_config_data_budget_and_one_example_with_its_mask(
    config: Config, tmp_path: Path
) -> None:
    overrides = [f"storage={tmp_path}", "parallel.workers=2", "method.dropout=0.1"]
    plan = make_plan(QUICKSTART, overrides, lambda line: None)
    text = describe(plan)
    assert "strategy: ddp (the base is frozen: 2 workers each hold it and share gradients)" in text
    assert f"storage: {tmp_path}" in text
    assert f"in {-(-plan.budget_examples // 16):,} steps" in text
    assert "method.dropout=0.1 draws noise" in text
    assert text.count("[[") == 2  # one in the heading
    shown = text.split("carries loss:")[1]
    assert shown.index("[[") < shown.index("</s>]]")
    assert not (tmp_path / "quickstart").exists()


def test_plan_refuses_what_a_sweep_would(config: Config, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is more than the"):
        make_plan(
            QUICKSTART,
            [f"storage={tmp_path}", "search.scheduler.grace_examples=99999"],
            lambda line: None,
        )


def test_plan_refuses_a_relative_storage_on_several_nodes_as_train_does(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:6379")
    monkeypatch.delenv("RAYTUNE_FT_STORAGE", raising=False)
    monkeypatch.setattr("raytune_ft.train.ray_cluster.connected", nullcontext)
    monkeypatch.setattr("raytune_ft.train.ray_cluster.node_count", lambda: 2)
    with pytest.raises(StorageError, match=r"storage=runs is relative, .*on several nodes"):
        make_plan(QUICKSTART, ["parallel.workers=2"], lambda line: None)


def test_compute_is_counted_over_the_budget(config: Config, tmp_path: Path) -> None:
    assert estimate_flops(total=100, trained=100, tokens=7) == 6 * 100 * 7
    assert estimate_flops(total=110, trained=10, tokens=7) == (4 * 110 + 2 * 10) * 7
    one = make_plan(QUICKSTART, [f"storage={tmp_path}", "train.epochs=1"], lambda line: None)
    assert one.tokens == one.report.splits["train"].tokens
    two = make_plan(QUICKSTART, [f"storage={tmp_path}", "train.epochs=2"], lambda line: None)
    assert two.tokens == 2 * one.tokens
    assert f"compute of a run: {two.tokens:,} tokens, " in describe(two)
