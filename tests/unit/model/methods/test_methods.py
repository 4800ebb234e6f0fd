"""What every method does to a model, and what `freeze` chooses."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from raytune_ft.config.methods import (
    FreezeMethod,
    Ia3Method,
    LoraMethod,
    OftMethod,
    VeraMethod,
)
from raytune_ft.config.rules import check
from raytune_ft.config.schema import ModelConfig
from raytune_ft.config.train import TrainConfig
from raytune_ft.errors import ConfigError, ModelError
from raytune_ft.estimate.parameters import build_shell
from raytune_ft.merge.fold import fold
from raytune_ft.model.export import Exporter
from raytune_ft.model.load import build_model
from raytune_ft.model.methods import param_groups, trained_parameters, without_method
from raytune_ft.tensors.read import open_shards
from raytune_ft.train.optim import build_optimizer
from tests.support.families import save_tiny_family
from tests.support.methods import ABSENT, SMALL, small_config
from tests.support.models import save_tiny, save_tiny_llama
from tests.support.runs import BrokenRun, Recorder, final_weights, make_inputs, run

TOKENS = torch.arange(2, 34).view(2, 16)


def _named(name: str) -> Any:
    return pytest.param(name, marks=pytest.mark.skipif(name in ABSENT, reason="not installed"))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("base") / "model")


def _method(name: str, base: Path) -> Any:
    return small_config(name, (base, base)).method


def _logits(model: Any) -> torch.Tensor:
    logits: torch.Tensor = model(input_ids=TOKENS, use_cache=False).logits
    return logits[:, -TOKENS.shape[1] :]


@pytest.mark.parametrize("name", [*map(_named, SMALL)])
def test_only_its_own_weights_move(base: Path, name: str) -> None:
    model = build_model(ModelConfig(path=str(base)), _method(name, base), "float32", 0)
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    own = trained_parameters(model)
    optimizer = torch.optim.AdamW(own.values(), lr=1e-2, weight_decay=0.1)
    for _ in range(3):  # a B of zeros leaves its A without a gradient once
        _logits(model).log_softmax(-1)[..., 5].mean().neg().backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = {key for key, p in model.named_parameters() if not torch.equal(p, before[key])}
    assert moved == own.keys()


@pytest.mark.parametrize("name", [*map(_named, SMALL)])
def test_without_the_method_the_base_computes(base: Path, name: str) -> None:
    model = build_model(ModelConfig(path=str(base)), _method(name, base), "float32", 0)
    if name == "qlora":
        pytest.skip("its base is rounded")
    plain = build_model(ModelConfig(path=str(base)), _method("full", base), "float32", 0)
    with torch.no_grad(), without_method(model):
        assert torch.equal(_logits(model), _logits(plain))


@pytest.mark.parametrize("name", [*map(_named, SMALL)])
def test_the_plan_counts_what_is_trained(base: Path, name: str) -> None:
    method, path = _method(name, base), ModelConfig(path=str(base))
    built = trained_parameters(build_model(path, method, "float32", 0))
    size = sum(parameter.numel() for parameter in built.values())
    shell = build_shell(path, method, "float32")
    assert shell.trained == size > 0


@pytest.mark.parametrize("name", [*map(_named, SMALL)])
def test_trained_weights_are_masters_and_frozen_ones_narrow(base: Path, name: str) -> None:
    model = build_model(ModelConfig(path=str(base)), _method(name, base), "bfloat16", 0)
    for key, parameter in model.named_parameters():
        own = (".base_layer." not in key and "default" in key) or parameter.requires_grad
        narrow = torch.uint8 if hasattr(parameter, "quant_type") else torch.bfloat16
        assert parameter.dtype == (torch.float32 if own else narrow), key
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.isfinite(_logits(model)).all()


def _trained(base: Path, **keys: Any) -> set[str]:
    method = FreezeMethod(name="freeze", **keys)
    built = build_model(ModelConfig(path=str(base)), method, "float32", 0)
    return {re.sub(r"^model\.|\.weight$", "", name) for name in trained_parameters(built)}


@pytest.mark.parametrize(
    ("family", "left_out"),
    [("mamba2", "out_proj"), ("falcon_h1", "out_proj"), ("llama4_text", "router")],
)
def test_all_linear_leaves_out_what_cannot_be_adapted(
    tmp_path: Path, family: str, left_out: str
) -> None:
    model = ModelConfig(path=str(save_tiny_family(family, tmp_path / "base")))
    built: Any = build_model(model, LoraMethod(rank=2), "float32", 0)
    assert any(name.endswith(left_out) for name, _ in built.named_modules())
    assert not any(f".{left_out}." in name for name in trained_parameters(built))
    assert built.peft_config["default"].exclude_modules == [left_out]
    if left_out == "out_proj":
        with pytest.raises(ModelError, match=r"targets.*incompatible.*write all-linear"):
            build_model(model, LoraMethod(rank=2, targets=[left_out]), "float32", 0)


def test_freeze_chooses(base: Path) -> None:
    top = {"norm", "lm_head"}
    upper = {
        *(f"layers.1.self_attn.{part}_proj" for part in "qkvo"),
        *(f"layers.1.mlp.{part}_proj" for part in ("gate", "up", "down")),
        "layers.1.input_layernorm",
        "layers.1.post_attention_layernorm",
    }
    norms = {"layers.0.input_layernorm", "layers.0.post_attention_layernorm"}
    assert _trained(base, first=1) == _trained(base, last=1) == upper | top
    assert _trained(base, last=0) == top
    assert _trained(base, last=0, embeddings=True, head=False) == {"embed_tokens"}
    assert _trained(base, last=1, norms=True) == upper | top | norms
    assert _trained(base, last=0, norms=False) == {"lm_head"}
    queries = _trained(base, last=0, head=False, train=["q_proj"], freeze=["layers.1"])
    assert queries == {"layers.0.self_attn.q_proj"}
    assert _trained(base, last=0, head=False, train=["*.0.*v_proj.weight"]) == {
        "layers.0.self_attn.v_proj"
    }


def test_a_tied_head_goes_with_the_embeddings(tmp_path: Path) -> None:
    tied = save_tiny("qwen3", tmp_path / "tied")
    assert _trained(tied, last=0) == {"norm"}
    assert _trained(tied, last=0, embeddings=True) == {"norm", "embed_tokens"}


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"last": 3}, "method.last=3 is more than the 2 blocks of this LlamaForCausalLM; write at"),
        (
            {"train": ["q_prj"]},
            "method.train=q_prj names no weight of .*; write names such as q_pr",
        ),
        ({"freeze": ["*.bias"]}, r"method.freeze=\*.bias names no weight of this LlamaForCausalLM"),
        ({"last": 0, "head": False}, "method.name=freeze leaves no weight of this Llama"),
    ],
)
def test_what_freeze_refuses(base: Path, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        _trained(base, **keys)


def test_freeze_keys_that_contradict_each_other(base: Path) -> None:
    inputs = (base, base)
    both = small_config("freeze", inputs, method={"name": "freeze", "first": 1, "last": 1})
    with pytest.raises(ConfigError, match=r"method.first=1 counts .*; write one of the two"):
        check(both)
    gradual = {"name": "freeze", "unfreeze_every_examples": 5}
    zero = small_config("freeze", inputs, method=gradual, parallel__strategy="deepspeed")
    with pytest.raises(ConfigError, match=r"method\.unfreeze_every_examples=5 is not suppor"):
        check(zero)


def test_gradual_unfreezing(tmp_path: Path) -> None:
    """Block 1 and the top from the start, block 0 after 20 examples, embeddings after 40."""
    inputs = make_inputs(tmp_path)
    gradual = {
        "name": "freeze",
        "first": 0,
        "embeddings": True,
        "unfreeze_every_examples": 20,
    }
    config = small_config(
        "freeze",
        inputs,
        method=gradual,
        train__weight_decay=0.1,
        train__lr_schedule="constant",
        train__warmup_fraction=0.0,
        train__lr=1e-3,
        train__adam_epsilon=1e-12,
        checkpoint__every_examples=1,
        checkpoint__keep_last=20,
        checkpoint__asynchronous=False,
    )
    run(config, tmp_path / "run")
    states = [_state(path) for path in sorted((tmp_path / "run" / "checkpoints").glob("step-*"))]
    start = build_model(config.model, config.method, "float32", 0)
    states.insert(0, {name: p.detach() for name, p in trained_parameters(start).items()})
    begins = {"layers.1.": 1, "lm_head": 1, "layers.0.": 4, "embed_tokens": 7}  # ceil(n / 7) + 1
    for part, first in begins.items():
        name = next(key for key in states[0] if part in key and "norm" not in key)
        moved = [not torch.equal(a[name], b[name]) for a, b in pairwise(states)]
        assert moved == [step >= first for step in range(1, 13)], name
        # A first step of Adam is the rate itself, whatever the gradient, and the decay beside it.
        before, after = states[first - 1][name], states[first][name]
        change = (after - before * (1 - 1e-3 * 0.1))[before.abs().sum(-1) > 0]
        assert change[change != 0].abs().median().item() == pytest.approx(1e-3, rel=1e-3)
    for fail_at in (3, 6):
        again = tmp_path / f"again-{fail_at}"
        with pytest.raises(BrokenRun):
            run(config, again, reporter=Recorder(fail_at=fail_at))
        run(config, again, resumes=True)
        ours, theirs = final_weights(again), final_weights(tmp_path / "run")
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def _state(checkpoint: Path) -> dict[str, torch.Tensor]:
    with open_shards(checkpoint / "state", "model") as weights:
        return {name: weights.whole(name) for name in weights.shapes}


PLAIN_LORA = {
    "rank": 3,
    "alpha": 5.0,
    "rank_pattern": {"q_proj": 2},
    "alpha_pattern": {"o_proj": 7.0},
}


@pytest.mark.filterwarnings("ignore:Using Rank-Stabilized LoRA with rank_pattern")
@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize(
    ("init", "family"),
    [("pissa", "llama"), ("olora", "llama"), ("olora", "gpt2"), ("pissa", "gpt2")],
)
def test_pissa_and_olora_are_those_of_peft(
    tmp_path: Path, init: str, family: str, rslora: bool
) -> None:
    """The same model as PEFT trains, after the same steps, and what is saved fits the base."""
    base = save_tiny(family, tmp_path / "base")
    patterns = (
        {} if family == "gpt2" else {k: PLAIN_LORA[k] for k in ("rank_pattern", "alpha_pattern")}
    )
    method = LoraMethod(rank=3, alpha=5.0, rslora=rslora, init=init, **patterns)  # type: ignore[arg-type]
    ours = build_model(ModelConfig(path=str(base)), method, "float32", 0)
    plain: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    with torch.no_grad():
        assert (_logits(ours) - _logits(plain)).abs().max() < 1e-5
        with without_method(ours):
            assert torch.equal(_logits(ours), _logits(plain))
    if (init, family) != ("olora", "gpt2"):  # whose transposed weights PEFT does not take apart
        config = LoraConfig(
            r=3,
            lora_alpha=5.0,
            target_modules="all-linear",
            use_rslora=rslora,
            init_lora_weights=init,
            task_type="CAUSAL_LM",
            fan_in_fan_out=family == "gpt2",
            **patterns,
        )
        theirs: Any = get_peft_model(
            AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config
        ).eval()
        _step(theirs)
    _step(ours)
    exporter = Exporter(ours, torch.float32)
    own = trained_parameters(ours)
    (tmp_path / "adapter").mkdir()
    exporter.save(lambda name: own[name].detach(), tmp_path / "adapter", 0, 1)
    loaded = PeftModel.from_pretrained(plain, str(tmp_path / "adapter")).eval()
    with torch.no_grad():
        assert (_logits(loaded) - _logits(ours)).abs().max() < 1e-5
        if (init, family) != ("olora", "gpt2"):
            assert (_logits(theirs) - _logits(ours)).abs().max() < 1e-4
    model = ModelConfig(path=str(base))
    fold(model, tmp_path / "adapter", tmp_path / "model", [TOKENS[0]])
    folded: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    with torch.no_grad():
        assert (_logits(folded.eval()) - _logits(ours)).abs().max() < 1e-5


def _step(model: Any) -> None:
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(weights, lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        _logits(model).log_softmax(-1)[..., 5].mean().neg().backward()
        optimizer.step()


def test_lora_plus_moves_b_faster(base: Path) -> None:
    """One step of Adam is as long as its rate."""
    method = LoraMethod(rank=2, lr_ratio=8.0)
    model = build_model(ModelConfig(path=str(base)), method, "float32", 0)
    own = trained_parameters(model)
    optimizer = build_optimizer(own, TrainConfig(lr=1e-3), param_groups(model, method))
    rates = {
        name: group["lr_ratio"]
        for group in optimizer.param_groups
        for name, p in own.items()
        if any(p is each for each in group["params"])
    }
    assert rates == {name: 8.0 if "lora_B" in name else 1.0 for name in own}


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (LoraMethod(rank_pattern={"q_pro": 2}), "method.rank_pattern.q_pro names no adapted layer"),
        (
            LoraMethod(alpha_pattern={"(": 2.0}),
            r"method.alpha_pattern.\( is not a regular expression",
        ),
        (
            LoraMethod(init="pissa", rank=33),
            "method.rank=33 is larger than the weight .*; write at most 32",
        ),
        (LoraMethod(init="olora", targets=["embed_tokens"]), "init=olora needs linear layers"),
        (
            Ia3Method(name="ia3", targets=["q_prj"]),
            "names no layer .*; write all-linear, or names su",
        ),
        (Ia3Method(name="ia3", feedforward=["up"]), "method.feedforward=up names no layer"),
        (VeraMethod(name="vera", targets=["embed_tokens"]), "cannot be adapted"),
        (OftMethod(name="oft", targets=["nothing"]), "method.targets=nothing names no layer"),
    ],
)
def test_what_adapters_refuse(base: Path, method: Any, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        build_model(ModelConfig(path=str(base)), method, "float32", 0)


def test_ia3_names_what_it_does_not_know(tmp_path: Path) -> None:
    base = save_tiny("phi3", tmp_path / "base")
    method = Ia3Method(name="ia3")
    with pytest.raises(ModelError, match=r"method\.targets=auto cannot be adapted"):
        build_model(ModelConfig(path=str(base)), method, "float32", 0)
