"""Methods that work on activations, against what was published and against PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig
from peft import get_peft_model as wrap
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from raytune_ft.config.rules import check
from raytune_ft.config.schema import Config, ModelConfig
from raytune_ft.data.batch import collate
from raytune_ft.data.split import TokenizedSplit
from raytune_ft.errors import CheckpointError, ConfigError, ModelError
from raytune_ft.evaluate.context import runner_of
from raytune_ft.evaluate.generate import with_transformers
from raytune_ft.model.load import build_model, load_tokenizer
from raytune_ft.model.meta import build_shapes
from raytune_ft.model.methods import adapter_writer, trained_parameters, without_method
from raytune_ft.model.methods.hooks import seeing, virtual_tokens
from raytune_ft.model.methods.saved import attach_saved, unfoldable
from tests.support.activations import METHODS
from tests.support.models import save_tiny, save_tiny_llama, true_float64
from tests.support.runs import make_config

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("base"))


def config_of(base: Path, method: dict[str, Any]) -> Config:
    return make_config(base, base / "rows.jsonl", {"method": method})


def moved(base: Path, name: str, precision: Any = "float64", **changes: Any) -> Any:
    """A model with the method, whose trained weights have left their beginning."""
    config = config_of(base, METHODS[name] | changes)
    model: Any = build_model(config.model, config.method, precision, 0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in trained_parameters(model).values():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter += (0.1 * noise).to(parameter.dtype)
    return model


def saved(model: nn.Module, directory: Path) -> Path:
    directory.mkdir(parents=True)
    write = adapter_writer(model)
    assert write is not None
    write(lambda name: model.get_parameter(name).detach(), directory)
    return directory


def split_of(lengths: list[int], prompts: list[int]) -> TokenizedSplit:
    rng = np.random.default_rng(0)
    return TokenizedSplit.from_examples(
        [
            (rng.integers(2, 90, n).astype(np.int32), np.arange(n) >= prompt)
            for n, prompt in zip(lengths, prompts, strict=True)
        ]
    )


def summed_loss(model: Any, split: TokenizedSplit, layout: Any) -> Tensor:
    batch = collate(split, range(len(split)), layout, 1, CPU, virtual_tokens(model))
    with seeing(model, batch):
        logits = model(**batch.model_inputs()).logits
    return nn.functional.cross_entropy(
        logits.flatten(0, 1), batch.targets_BS.flatten(), ignore_index=-100, reduction="sum"
    )


@pytest.mark.parametrize(
    ("tied", "layers", "prompt"),
    [(False, "all", 7), (True, "all", 7), (False, [1], 7), (False, "all", 4), (False, "all", 1)],
)
def test_loreft_is_the_published_equation(
    base: Path, tmp_path: Path, tied: bool, layers: Any, prompt: int
) -> None:
    """Block by block of the plain base, with h + R^T (W h + b - R h) written out token by token."""
    model = moved(base, "loreft", tied=tied, layers=layers)
    tensors = load_file(saved(model, tmp_path / "adapter") / "adapter_model.safetensors")
    values = {name: t.double().requires_grad_() for name, t in tensors.items()}
    split = split_of([12], [prompt])
    with true_float64():
        loss = summed_loss(model, split, ((0,),))
        loss.backward()
        expected = _by_hand(base, values, split, prompt, tied, layers)
        expected.backward()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-6)  # R is written in float32
    for name, value in values.items():
        number, end, kind = name.split(".")
        if kind != "R":
            own = {"W": "weight", "b": "bias"}[kind]
            found = model.get_parameter(f"model.layers.{number}.loreft.ends.{end}.{own}").grad
            wanted = torch.zeros_like(value) if value.grad is None else value.grad
            torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-5)
        else:
            torch.testing.assert_close(value @ value.T, torch.eye(3).double(), atol=1e-6, rtol=0)


def _by_hand(
    base: Path, values: dict[str, Tensor], split: TokenizedSplit, prompt: int, tied: bool, at: Any
) -> Tensor:
    plain: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
    ids, mask = split.example(0)
    first = [i for i in range(prompt) if i < 3]
    last = [i for i in range(prompt) if i >= prompt - 2]
    both = set(first) & set(last)
    first = [i for i in first if i not in both or i < prompt - i]
    last = [i for i in last if i not in first]
    arguments: dict[str, Any] = {}

    def keep(module: Any, given: Any, named: dict[str, Any]) -> None:
        arguments.update(named)
        arguments["h"] = given[0] if given else named["hidden_states"]

    with plain.model.layers[0].register_forward_pre_hook(keep, with_kwargs=True):
        plain(input_ids=torch.from_numpy(ids.astype(np.int64))[None], use_cache=False)
    h = arguments.pop("h")
    arguments.pop("hidden_states", None)
    for number, block in enumerate(plain.model.layers):
        h = block(h, **arguments)
        if at != "all" and number not in at:
            continue
        rows = list(h[0])
        for end, places in {"first": first, "last": last}.items():
            key = f"{number}.{'both' if tied else end}"
            r, w, b = (values[f"{key}.{kind}"] for kind in "RWb")
            for i in places:
                rows[i] = rows[i] + r.T @ (w @ rows[i] + b - r @ rows[i])
        h = torch.stack(rows)[None]
    log_p = plain.lm_head(plain.model.norm(h))[0].log_softmax(-1)
    terms = [-log_p[i - 1, int(ids[i])] for i in range(1, len(ids)) if mask[i]]
    return torch.stack(terms).sum()


def test_the_gradient_of_the_rotation_is_that_of_any_orthonormalisation(base: Path) -> None:
    """Finite differences of the whole loss in the free parameter."""
    model, split = moved(base, "loreft"), split_of([9, 12], [5, 7])
    parameter = model.get_parameter("model.layers.0.loreft.ends.first.rotation")
    with true_float64():
        summed_loss(model, split, ((0, 1),)).backward()
        grad = parameter.grad.clone()
        step = torch.randn(parameter.shape, dtype=torch.float64) * 1e-5
        sides = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter += sign * step
                sides.append(summed_loss(model, split, ((0, 1),)).item())
                parameter -= sign * step
    assert (sides[0] - sides[1]) / 2 == pytest.approx((grad * step).sum().item(), rel=1e-5)


@pytest.mark.parametrize("name", ["prompt", "p_tuning", "prefix"])
def test_loss_and_gradients_are_those_of_peft(base: Path, name: str) -> None:
    model = moved(base, name)
    facts: dict[str, Any] = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 5}
    configs = {
        "prompt": lambda: PromptTuningConfig(**facts),
        "p_tuning": lambda: PromptEncoderConfig(**facts, encoder_hidden_size=16),
        "prefix": lambda: PrefixTuningConfig(**facts, prefix_projection=True),
    }
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
    theirs: Any = wrap(plain, configs[name]()).double()
    theirs.prompt_encoder["default"].load_state_dict(model.prompt_encoder.state_dict())
    lengths, prompts = [9, 12, 6], [4, 7, 2]
    split = split_of(lengths, prompts)
    layout = ((0,), (1,), (2,)) if name == "prefix" else ((0, 2), (1,))
    with true_float64():
        loss = summed_loss(model, split, layout)
        loss.backward()
        total = torch.zeros((), dtype=torch.float64)
        for i, n in enumerate(lengths):
            ids, mask = split.example(i)
            labels = torch.from_numpy(np.where(mask, ids, -100).astype(np.int64))[None]
            inputs = torch.from_numpy(ids.astype(np.int64))[None]
            out = theirs(input_ids=inputs, attention_mask=torch.ones(1, n), labels=labels)
            total = total + out.loss * int(mask.sum())
        total.backward()
    assert loss.item() == pytest.approx(total.item(), abs=1e-9)
    wanted = dict(theirs.prompt_encoder["default"].named_parameters())
    for key, parameter in model.prompt_encoder.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[key].grad, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("name", ["prompt", "p_tuning", "prefix"])
def test_peft_loads_what_is_saved(base: Path, tmp_path: Path, name: str) -> None:
    model = moved(base, name, "float32")
    saved(model, tmp_path / "adapter")
    split = split_of([12], [5])
    plain = AutoModelForCausalLM.from_pretrained(base)
    loaded = PeftModel.from_pretrained(plain, str(tmp_path / "adapter")).eval()
    ids = torch.from_numpy(split.input_ids.astype(np.int64))[None]
    batch = collate(split, [0], ((0,),), 1, CPU, virtual_tokens(model))
    with torch.no_grad(), seeing(model, batch):
        ours = model(**batch.model_inputs()).logits[:, -12:]
        theirs = loaded(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, -12:]
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("name", METHODS)
def test_generation_in_batches_is_generation_one_by_one(
    tmp_path: Path, name: str, family: str
) -> None:
    """From the files, and against tokens chosen one at a time without a cache."""
    base = save_tiny(family, tmp_path / "base")
    model = moved(base, name, "float32")
    assert unfoldable(saved(model, tmp_path / "adapter")) is not None
    own = ModelConfig(path=str(tmp_path / "adapter"))
    engine = runner_of(
        own, load_tokenizer(ModelConfig(path=str(base))), ModelConfig(path=str(base))
    )
    prompts = [tuple(range(5, 5 + n)) for n in (3, 11, 6)]
    together = with_transformers(engine, own, prompts, 6, ())
    alone = [with_transformers(engine, own, [prompt], 6, ())[0] for prompt in prompts]
    assert together == alone
    assert alone == [_one_at_a_time(engine, list(prompt)) for prompt in prompts]


@torch.no_grad()
def _one_at_a_time(engine: Any, prompt: list[int]) -> list[int]:
    """What a training batch of prompt and continuation predicts, the prompt being the prompt."""
    made: list[int] = []
    for _ in range(6):
        ids = np.array([*prompt, *made, 5], np.int32)  # the last one is a label to be found
        mask = np.arange(len(ids)) >= len(prompt)
        split = TokenizedSplit.from_examples([(ids, mask)])
        made.append(int(engine.logits(engine.collate(split, [0], ((0,),)))[-1].argmax()))
    return made


@pytest.mark.parametrize("name", METHODS)
def test_without_the_method_the_base_is_left(base: Path, name: str) -> None:
    model, split = moved(base, name, "float32"), split_of([9, 6], [4, 2])
    plain = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad(), without_method(model):
        found = summed_loss(model, split, ((0,), (1,)))
    with torch.no_grad():
        assert found.item() == summed_loss(plain, split, ((0,), (1,))).item()
        assert summed_loss(model, split, ((0,), (1,))).item() != found.item()
    config = config_of(base, METHODS[name])
    trained = sum(p.numel() for p in trained_parameters(model).values())
    shapes = trained_parameters(build_shapes(config.model, config.method))
    assert sum(p.numel() for p in shapes.values()) == trained > 0


def test_init_text_begins_with_its_words(base: Path) -> None:
    config = config_of(base, {"name": "prompt", "tokens": 5, "init_text": "ab"})
    model: Any = build_model(config.model, config.method, "float32", 0)
    ids = load_tokenizer(config.model)("ab")["input_ids"]
    words = model.get_input_embeddings().weight[torch.tensor([*ids, *ids, ids[0]])]
    assert torch.equal(model.prompt_encoder.embedding.weight, words)


@pytest.mark.parametrize(
    ("method", "error"),
    [
        ({"name": "loreft", "rank": 33}, "rank=33 is above the 32 hidden units"),
        ({"name": "loreft", "layers": [0, 2]}, "names block 2, and this LlamaForCausalLM has 2"),
        ({"name": "adapter", "layers": [5]}, "names block 5"),
    ],
)
def test_what_the_model_cannot_take(base: Path, method: dict[str, Any], error: str) -> None:
    config = config_of(base, method)
    with pytest.raises(ModelError, match=error):
        build_shapes(config.model, config.method)


def test_an_adapter_of_another_model(base: Path, tmp_path: Path) -> None:
    saved(moved(base, "adapter", "float32"), tmp_path / "adapter")
    other: Any = AutoModelForCausalLM.from_pretrained(save_tiny("gpt2", tmp_path / "gpt2"))
    with pytest.raises(CheckpointError, match="is not an adapter of its base"):
        attach_saved(other, tmp_path / "adapter")


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"method.positions": {"first": 0, "last": 0}}, "names no token"),
        ({"method.layers": []}, "names no block"),
        ({"method.layers": [1, 1]}, "names 1 twice"),
        ({"promote.merge": "greedy_soup"}, "merges weights, and method.name=loreft changes none"),
        ({"promote.metrics": ["lm_eval:arc"]}, "evaluates a plain model"),
    ],
)
def test_what_a_config_cannot_say(base: Path, changes: dict[str, Any], error: str) -> None:
    config = make_config(base, base / "rows.jsonl", {"method": {"name": "loreft"}} | changes)
    with pytest.raises(ConfigError, match=error):
        check(config)
