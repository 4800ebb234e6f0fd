"""The table of options, for a model that this machine could never hold."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import pytest

import raytune_ft.model
from raytune_ft.errors import ConfigError
from raytune_ft.format import GIB
from raytune_ft.plan.layouts import node_counts
from raytune_ft.plan.make import Asked, Plan, make_plan
from raytune_ft.plan.text import describe

pytestmark = pytest.mark.usefixtures("traced_once")
ROOT = Path(__file__).parents[3]
LLAMA_70B = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 8192,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "intermediate_size": 28672,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
}


@pytest.fixture(scope="module")
def llama_70b(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config and a tokenizer, and no weights."""
    directory = tmp_path_factory.mktemp("llama-70b")
    (directory / "config.json").write_text(json.dumps(LLAMA_70B))
    tiny = Path(raytune_ft.model.__file__).parent / "tiny"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny / name, directory)
    return directory


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The rows are tokenised there once."""
    return tmp_path_factory.mktemp("storage")


def plan_of(model: Path, storage: Path, method: str, asked: Asked, *more: str) -> Plan:
    return make_plan(
        ROOT / "jobs" / "quickstart.yaml",
        [
            f"model.path={model}",
            f"storage={storage}",
            f"method.name={method}",
            "data.train.path=" + str(ROOT / "jobs/data/tiny_instructions/train.jsonl"),
            "data.test=null",
            "search=null",
            "train.batch_size=128",
            "train.precision=bfloat16",
            *more,
        ],
        lambda line: None,
        asked,
    )


def test_all_weights_of_70b_on_1_to_16_nodes(llama_70b: Path, storage: Path) -> None:
    started, used = time.perf_counter(), time.process_time()
    plan = plan_of(llama_70b, storage, "full", Asked(nodes=16, accelerator="H100"))
    # Of a core's time, which other work on the machine does not change; of the clock if it is idle.
    assert min(time.perf_counter() - started, time.process_time() - used) < 30
    assert plan.total_parameters == plan.trained_parameters == 70_553_706_496
    assert plan.config.parallel.max_workers == 128
    memory = plan.own.memory
    state = 70_553_706_496 * 4 / 128
    assert memory.parameters == pytest.approx(state, rel=0.01)
    assert memory.gradients == pytest.approx(state, rel=0.01)
    assert memory.optimizer == pytest.approx(2 * state, rel=0.01)
    options = {option.name: option for option in plan.options}
    copied = options["ddp"]
    assert copied.rejected is not None
    # Weights, gradients and moments in float32 alone are 4 x 262.8 GiB.
    assert copied.memory.peak > 4 * 70_553_706_496 * 4
    assert copied.rejected.startswith("does not fit: needs 1,")
    assert copied.rejected.endswith(" GiB, has 75.2 GiB")
    assert options["fsdp"].rejected is None
    assert [choice.nodes for choice in plan.node_choices] == [1, 2, 4, 8, 16]
    # 80 GB x 8 hold no 1,050 GiB of state; 32 workers do.
    first, four = plan.node_choices[0], plan.node_choices[2]
    assert first.option is None or first.option.parallel.offload == "all"
    assert four.option is not None
    assert four.option.memory.peak < 75.2 * GIB
    text = describe(plan)
    assert "options for 128 x H100 on 16 nodes, 80.0 GiB each" in text
    assert "the fastest that fits, by this estimate: parallel.strategy=fsdp" in text


@pytest.mark.usefixtures("untraced")
@pytest.mark.parametrize(
    ("workers", "replicas"), [("8", {1}), ("9", {1}), ("16", {1, 2}), ("[8, 16]", {1})]
)
def test_replicas_are_offered_where_a_config_may_have_them(
    storage: Path, workers: str, replicas: set[int]
) -> None:
    """8 workers in a node."""
    asked, written = Asked(accelerator="H100"), f"parallel.workers={workers}"
    plan = plan_of(Path("builtin:tiny"), storage, "lora", asked, written)
    assert {option.parallel.replicas for option in plan.options} == replicas


@pytest.mark.slow
def test_adapters_on_70b_are_sharded_because_the_base_does_not_fit(
    llama_70b: Path, storage: Path
) -> None:
    plan = plan_of(llama_70b, storage, "lora", Asked(nodes=1, accelerator="H100"))
    assert plan.config.parallel.strategy == "fsdp"
    assert "the base is frozen, and a whole copy needs 13" in plan.reason
    assert "GiB of a worker's 75.2: 8 workers shard it" in plan.reason


@pytest.mark.slow
def test_adapters_on_70b_are_copied_where_the_activations_fit_too(
    llama_70b: Path, storage: Path
) -> None:
    """192 GiB have room for the base, and for its activations if they are computed again."""
    larger, less = Asked(1, 8, "MI300X"), "parallel.activation_checkpointing=full"
    assert plan_of(llama_70b, storage, "lora", larger).config.parallel.strategy == "fsdp"
    assert plan_of(llama_70b, storage, "lora", larger, less).config.parallel.strategy == "ddp"


def test_too_many_workers_for_the_batch_are_said(llama_70b: Path, storage: Path) -> None:
    with pytest.raises(ConfigError, match=r"train.batch_size=128 is smaller than .*=256"):
        plan_of(llama_70b, storage, "full", Asked(nodes=32, accelerator="H100"))


def test_nodes_are_doubled_up_to_the_most() -> None:
    assert node_counts(1) == [1]
    assert node_counts(6) == [1, 2, 4, 6]
    assert node_counts(8) == [1, 2, 4, 8]
