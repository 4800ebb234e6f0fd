"""What `plan` says is what would happen."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path

import pytest

from raytune_ft.config.load import load_config
from raytune_ft.config.methods import LoraMethod
from raytune_ft.config.resolve import resolve
from raytune_ft.config.schema import Config, ModelConfig
from raytune_ft.errors import ConfigError, StorageError
from raytune_ft.estimate.hardware import USABLE
from raytune_ft.estimate.parameters import build_shell
from raytune_ft.model.load import build_frozen, load_model_config
from raytune_ft.plan.make import Plan, make_plan
from raytune_ft.plan.text import describe
from tests.support.families import save_tiny_family

pytestmark = pytest.mark.usefixtures("traced_once")
ROOT = Path(__file__).parents[3]
QUICKSTART = ROOT / "jobs" / "quickstart.yaml"


@pytest.fixture
def config(monkeypatch: pytest.MonkeyPatch) -> Config:
    monkeypatch.chdir(ROOT)
    return resolve(load_config(QUICKSTART))


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
    monkeypatch.setattr("raytune_ft.ray_backend.cluster.connected", nullcontext)
    monkeypatch.setattr("raytune_ft.ray_backend.cluster.node_count", lambda: 2)
    monkeypatch.setattr("raytune_ft.ray_backend.cluster.gpu_count", lambda parallel: 0)
    memory = "raytune_ft.ray_backend.cluster.cluster_worker_memory"
    monkeypatch.setattr(memory, lambda resources: None)
    with pytest.raises(StorageError, match=r"storage=runs is relative, .*on several nodes"):
        make_plan(QUICKSTART, ["parallel.workers=2"], lambda line: None)


@pytest.mark.usefixtures("untraced")
def test_a_cluster_that_is_joined_says_nodes_and_memory(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = 7 * 2**30
    resources = {"CPU": 2.0, "memory": 2.0 * memory}
    node = {"Alive": True, "NodeManagerAddress": "10.0.0.2", "Resources": resources, "Labels": {}}
    alive = [{**node, "NodeID": f"{number}"} for number in range(3)]
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:6379")
    monkeypatch.setattr("raytune_ft.ray_backend.cluster.connected", nullcontext)
    monkeypatch.setattr("ray.nodes", lambda: alive)
    overrides = [f"storage={tmp_path}", "parallel.workers=4"]
    plan = make_plan(QUICKSTART, overrides, lambda line: None)
    assert (plan.hardware.nodes, plan.hardware.per_node) == (2, 2)
    assert plan.hardware.usable == plan.hardware.memory == memory
    assert [choice.workers for choice in plan.node_choices] == [2, 4]

    resources |= {"GPU": 1.0, "accelerator_type:L4": 1.0}
    told: list[str] = []
    plan = make_plan(QUICKSTART, [*overrides, "parallel.workers=3"], told.append)
    assert told[0] == "each worker computes on a GPU: the nodes that suit have 3"
    assert plan.config.parallel.resources == {"CPU": 1.0, "GPU": 1.0}
    assert (plan.hardware.name, plan.hardware.nodes, plan.hardware.per_node) == ("L4", 3, 1)
    assert plan.hardware.memory == 22.5 * 2**30

    shared = [f"storage={tmp_path}", "parallel.resources_per_worker.GPU=0.5"]
    plan = make_plan(QUICKSTART, shared, lambda line: None)
    assert (plan.hardware.name, plan.hardware.nodes, plan.hardware.per_node) == ("L4", 1, 1)
    assert plan.hardware.memory == 11.25 * 2**30
    assert plan.hardware.usable == int(22.5 * 2**30 * USABLE * 0.5)


@pytest.mark.usefixtures("untraced")
def test_compute_is_counted_over_the_budget(config: Config, tmp_path: Path) -> None:
    one = make_plan(QUICKSTART, [f"storage={tmp_path}", "train.epochs=1"], lambda line: None)
    assert one.tokens == one.report.splits["train"].tokens
    two = make_plan(QUICKSTART, [f"storage={tmp_path}", "train.epochs=2"], lambda line: None)
    assert two.tokens == 2 * one.tokens
    assert f"compute of a run: {two.tokens:,} tokens, " in describe(two)


def test_a_teacher_is_in_memory_or_on_disk(config: Config, tmp_path: Path) -> None:
    teacher = ["train.objective=kd", "train.kd={teacher: builtin:tiny}", f"storage={tmp_path}"]
    live = make_plan(QUICKSTART, teacher, lambda line: None)
    kept = make_plan(QUICKSTART, [*teacher, "train.kd.cache=disk"], lambda line: None)
    assert live.own.memory.peak - kept.own.memory.peak == live.own.memory.beside > 0
    assert kept.own.memory.beside == 0
    assert ", other models " in describe(live)
    assert ", other models " not in describe(kept)
    labels = kept.report.splits["train"].label_tokens
    assert f"GiB ({labels:,} label tokens x 1,024 words x 4 bytes) in " in describe(kept)


def test_what_rollouts_hold_beside_the_model(config: Config, tmp_path: Path) -> None:
    """Whole copies of the base for a KL term, but under an adapter; and the critic of PPO."""
    grpo = ROOT / "jobs" / "quickstart_grpo.yaml"
    common = [f"storage={tmp_path}", "method.name=full"]

    def planned(*more: str) -> Plan:
        return make_plan(grpo, [*common, *more], lambda line: None)

    without, kl = planned("train.grpo.beta=0"), planned("train.grpo.beta=0.1")
    base = build_frozen(ModelConfig(path="builtin:tiny"), config.train.precision)
    weights = sum(weight.nbytes for weight in base.parameters())
    assert kl.own.memory.peak - without.own.memory.peak == kl.own.memory.beside == weights
    assert any("holds the model before training" in note for note in kl.notes)
    assert planned("method.name=lora", "train.grpo.beta=0.1").own.memory.beside == 0

    ppo = planned("train.objective=ppo", "train.ppo.kl_coef=0")
    hidden = base.get_input_embeddings().embedding_dim
    assert ppo.trained_parameters - without.trained_parameters == hidden + 1
    assert ppo.own.memory.optimizer - without.own.memory.optimizer == 2 * 4 * (hidden + 1)


@pytest.mark.usefixtures("untraced")
def test_attention_that_keeps_fewer_keys_than_a_row_has(config: Config, tmp_path: Path) -> None:
    model = save_tiny_family("deepseek_v32", tmp_path / "model")
    written = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(written | {"index_topk": 16}))
    overrides = [f"model.path={model}", f"storage={tmp_path}"]
    notes = make_plan(QUICKSTART, overrides, lambda line: None).notes
    assert any("index_topk=16" in note and "layout" in note for note in notes)


def test_layers_that_differ_in_their_heads(config: Config, tmp_path: Path) -> None:
    model = ModelConfig(path=str(save_tiny_family("dots3_note_text", tmp_path / "model")))
    shell = build_shell(model, LoraMethod(), "float32")
    layers = load_model_config(model).per_layer_config
    assert shell.heads_width == max(each.num_attention_heads * each.head_dim for each in layers)
