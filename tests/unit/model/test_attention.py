"""Attention example by example, against torch's over each of them alone."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModelForCausalLM,
    MistralConfig,
    PreTrainedModel,
)
from transformers.masking_utils import (
    chunked_causal_mask_function,
    sliding_window_causal_mask_function,
)

from raytune_ft.data.batch import collate
from raytune_ft.data.split import TokenizedSplit
from raytune_ft.errors import ConfigError, RunFailed
from raytune_ft.model.attention import (
    FLASH,
    WINDOW,
    Examples,
    Segments,
    Varlen,
    attend_by_example,
    attention,
    mask,
)
from tests.support.models import VOCABULARY, save_tiny
from tests.support.runs import make_config, make_inputs, run

LENGTHS = (3, 70, 33, 1, 40, 12)
ROWS = ((0, 1), (2, 3, 4), (5,))


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("length", [1, 2, 33, 300])
def test_bfloat16_on_a_cpu_is_causal_attention(length: int, autocast: bool) -> None:
    """Against float64: four heads share the keys and values of two; autocast rounds float32."""
    torch.manual_seed(0)
    module = torch.nn.Module()
    module.num_key_value_groups = 2  # type: ignore[assignment]
    rounded = [torch.randn(3, heads, length, 16).bfloat16() for heads in (4, 2, 2)]
    weights = torch.randn(3, length, 4, 16).bfloat16()
    examples = Examples((), None, torch.zeros(3, length, dtype=torch.long))

    def of(dtype: torch.dtype) -> list[Tensor]:
        heads = [each.to(dtype).requires_grad_() for each in rounded]
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast and dtype == torch.float32):
            out, _ = attention(module, *heads, None, scaling=0.3, examples=examples)
        return [out, *torch.autograd.grad(out, heads, weights.to(out.dtype))]

    found = of(torch.float32 if autocast else torch.bfloat16)
    assert found[0].dtype == torch.bfloat16
    for one, exact in zip(found, of(torch.float64), strict=True):
        assert (one.double() - exact).norm() < 6e-3 * exact.norm() + 1e-3


def test_bfloat16_on_a_cpu_has_its_backward_in_float32() -> None:
    """torch's own in bfloat16 is slower; dropout and values of another size are left to torch."""
    module, examples = torch.nn.Module(), Examples((), None, torch.zeros(1, 5, dtype=torch.long))
    query, key, value = (torch.randn(1, 2, 5, 8).bfloat16().requires_grad_() for _ in range(3))

    def backward(dropout: float, value: Tensor) -> str:
        out, _ = attention(module, query, key, value, None, dropout, examples=examples)
        below = out.grad_fn and out.grad_fn.next_functions[0][0]
        assert below is not None
        return below.name()

    assert "WideBackward" in backward(0.0, value)
    assert "WideBackward" not in backward(0.5, value)
    assert "WideBackward" not in backward(0.0, value[..., :4])


def _split() -> TokenizedSplit:
    rng = np.random.default_rng(0)
    rows = [rng.integers(0, VOCABULARY, length).astype(np.int32) for length in LENGTHS]
    return TokenizedSplit.from_examples([(ids, np.ones(len(ids), bool)) for ids in rows])


def _gradients(
    model: PreTrainedModel,
    split: TokenizedSplit,
    layout: Any,
    varlen: Varlen | None = None,
    share: bool = False,
) -> list[Tensor]:
    """Of all weights."""
    batch = collate(split, range(len(split)), layout, 0, torch.device("cpu"), share=share)
    inputs: dict[str, Any] = batch.model_inputs()
    if model.config._attn_implementation != "sdpa":
        inputs["attention_mask"] = torch.ones_like(batch.tokens_BS)
        inputs["examples"] = Examples.of(batch, varlen)
    logits = model(**inputs).logits
    keep_BS = batch.targets_BS >= 0
    loss = F.cross_entropy(logits[keep_BS], batch.targets_BS[keep_BS], reduction="sum")
    return list(torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad]))


def _model(family: str, directory: Path) -> PreTrainedModel:
    if "window" in family:
        shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
        config: Any = MistralConfig(
            vocab_size=VOCABULARY,
            intermediate_size=48,
            num_key_value_heads=2,
            sliding_window=int(family.split()[-1]),
            **shape,
        )
    else:
        config = AutoConfig.from_pretrained(save_tiny(family, directory))
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float64)
    return model.eval()


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "mistral, window 4"])
def test_packed_rows_have_the_gradient_of_examples_alone(tmp_path: Path, family: str) -> None:
    """Norms in float32 stand in the way of 1e-9 here; a leak would be in the first digits."""
    model, split = _model(family, tmp_path), _split()
    assert model.config._attn_implementation == "sdpa"
    alone = [_gradients(model, split, ((index,),)) for index in range(len(split))]
    expected = [torch.stack(parts).sum(0) for parts in zip(*alone, strict=True)]
    assert attend_by_example(model, True)
    for layout in (ROWS, tuple((index,) for index in range(len(split)))):
        found = _gradients(model, split, layout)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def _answers() -> TokenizedSplit:
    """Several answers to each of three prompts, of which the first has one token."""
    rng = np.random.default_rng(1)
    examples = []
    for prompt, answers in ((1, 2), (40, 3), (9, 1)):
        asked = rng.integers(0, VOCABULARY, prompt).astype(np.int32)
        for _ in range(answers):
            said = rng.integers(0, VOCABULARY, int(rng.integers(1, 30))).astype(np.int32)
            ids = np.concatenate([asked, said])
            examples.append((ids, np.arange(len(ids)) >= prompt))
    return TokenizedSplit.from_examples(examples)


SHARED_ROWS = ((0, 2, 1), (5, 3, 4))


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral, window 80"])
def test_a_prompt_computed_once_has_the_gradient_of_examples_alone(
    tmp_path: Path, family: str
) -> None:
    model, split = _model(family, tmp_path), _answers()
    alone = [_gradients(model, split, ((index,),)) for index in range(len(split))]
    expected = [torch.stack(parts).sum(0) for parts in zip(*alone, strict=True)]
    assert attend_by_example(model, True)
    for one, other in zip(_gradients(model, split, SHARED_ROWS, share=True), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("way", ["segments", "mask"])
def test_ways_to_attend_to_a_shared_prompt(kernel: Kernel, way: str) -> None:
    """Given to the kernel, and masked, where a layer cannot be given what it needs."""
    torch.manual_seed(0)
    split = _answers()
    batch = collate(split, range(len(split)), SHARED_ROWS, 0, torch.device("cpu"), share=True)
    gathered = Examples.of(batch)
    own_BS = gathered.owners_BS != -1
    shape = own_BS.shape
    heads = [torch.randn(shape[0], 4, shape[1], 8).double().requires_grad_() for _ in range(3)]
    weights = torch.randn(*shape, 4, 8).double() * own_BS[..., None, None]

    def of(examples: Examples, mask: Tensor | None = None) -> list[Tensor]:
        out, _ = attention(torch.nn.Module(), *heads, mask, scaling=0.3, examples=examples)
        return [out * own_BS[..., None, None], *torch.autograd.grad((out * weights).sum(), heads)]

    found = (
        of(Examples.of(batch, Varlen()))
        if way == "segments"
        else of(gathered, torch.ones(shape[1], shape[1], dtype=torch.bool).tril()[None, None])
    )
    assert bool(kernel.windows) == (way == "segments")
    for one, other in zip(found, of(gathered), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize("sick", range(len(LENGTHS)))
def test_nan_stays_in_its_example(sick: int) -> None:
    """Also on the way back, and in the padding of other rows."""
    split = _split()
    batch = collate(split, range(len(split)), ROWS, 0, torch.device("cpu"))
    owners_BS = Examples.of(batch).owners_BS
    examples = Examples.of(batch)
    heads = [torch.randn(*owners_BS.shape, 4, 8).transpose(1, 2) for _ in range(3)]
    for tensor in heads:
        tensor.transpose(1, 2)[owners_BS == sick] = torch.nan
        tensor.requires_grad_()
    out, _ = attention(torch.nn.Module(), heads[0], heads[1], heads[2], None, examples=examples)
    gradients = torch.autograd.grad((out * (owners_BS >= 0)[..., None, None]).sum(), heads)
    for found in (out, *(gradient.transpose(1, 2) for gradient in gradients)):
        assert found[owners_BS != sick].isfinite().all()
        assert found[owners_BS == sick].isnan().any()


def test_what_the_model_came_with_is_kept(tmp_path: Path) -> None:
    """Where it was asked for, where a router counts padding, and in what is saved."""
    directory = save_tiny("llama", tmp_path / "eager")
    eager = AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager")
    assert not attend_by_example(eager, True)
    mixtral = AutoModelForCausalLM.from_pretrained(
        save_tiny("mixtral", tmp_path / "mixtral"), output_router_logits=True
    )
    assert not attend_by_example(mixtral, True)

    inputs = make_inputs(tmp_path)
    config = make_config(*inputs, {"method": {"name": "full"}, "train.max_examples": 16})
    run(config, tmp_path / "run")
    (saved,) = (tmp_path / "run/checkpoints").glob("step-*/config.json")
    assert "by_example" not in saved.read_text()


@pytest.mark.parametrize("added", [True, False])
def test_a_mask_of_the_model_is_kept(added: bool) -> None:
    """It may be one of booleans, or numbers that are added to the scores."""
    torch.manual_seed(0)
    heads = [torch.randn(1, 2, 6, 8) for _ in range(3)]
    owners_BS = torch.tensor([[0, 0, 0, 1, 1, 1]])
    examples = Examples((), torch.arange(6)[None], owners_BS)
    window_SS = torch.ones(6, 6).tril().bool() & ~torch.ones(6, 6).tril(-2).bool()
    own: Tensor = torch.zeros(6, 6).masked_fill(~window_SS, -torch.inf) if added else window_SS
    module = torch.nn.Module()
    found, _ = attention(module, *heads, own.view(1, 1, 6, 6), examples=examples)
    for start in (0, 3):
        alone = [tensor[:, :, start : start + 3] for tensor in heads]
        expected = F.scaled_dot_product_attention(*alone, attn_mask=window_SS[:3, :3])
        torch.testing.assert_close(found[:, start : start + 3], expected.transpose(1, 2))


class Kernel:
    """What `varlen_attn` computes, one segment after another, on any device in any dtype."""

    def __init__(self, scaled_by: float = 1.0) -> None:
        self.windows: set[tuple[int, int]] = set()
        self._scaled_by = scaled_by

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        starts: Tensor,
        same: Tensor,
        longest: int,
        _: int,
        *,
        scale: float | None,
        window_size: tuple[int, int],
        enable_gqa: bool,
    ) -> Tensor:
        assert starts.dtype == torch.int32
        assert torch.equal(starts, same)
        assert longest == int(starts.diff().max())
        assert (starts[0], starts[-1]) == (0, len(query))
        assert enable_gqa or query.shape == key.shape
        self.windows.add(window_size)
        found = []
        for start, stop in itertools.pairwise(starts.tolist()):
            heads = [tensor[start:stop].transpose(0, 1) for tensor in (query, key, value)]
            at = torch.arange(stop - start)
            seen = at <= at[:, None]
            if window_size[0] >= 0:
                seen &= at >= at[:, None] - window_size[0]
            options: dict[str, Any] = {"scale": scale, "enable_gqa": enable_gqa}
            out = F.scaled_dot_product_attention(*heads, attn_mask=seen, **options)
            found.append(out.transpose(0, 1))
        return torch.cat(found) * self._scaled_by


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    """Takes every head, in place of torch's, which takes those on a GPU in bfloat16."""
    monkeypatch.setattr("raytune_ft.model.attention._not_for_varlen", lambda *heads: None)
    kernel = Kernel()
    monkeypatch.setattr("raytune_ft.model.attention.varlen_attn", kernel)
    return kernel


@pytest.mark.parametrize("layout", [ROWS, tuple((index,) for index in range(len(LENGTHS)))])
def test_segments_are_what_gathered_examples_are(layout: Any, kernel: Kernel) -> None:
    torch.manual_seed(0)
    split = _split()
    batch = collate(split, range(len(split)), layout, 0, torch.device("cpu"))
    own_BS = Examples.of(batch).owners_BS >= 0
    shape = own_BS.shape
    heads = [torch.randn(shape[0], count, shape[1], 8).double() for count in (4, 2, 2)]
    heads = [head.requires_grad_() for head in heads]
    module: Any = torch.nn.Module()
    module.num_key_value_groups = 2
    weights = torch.randn(*shape, 4, 8).double() * own_BS[..., None, None]

    def of(examples: Examples) -> list[Tensor]:
        out, _ = attention(module, *heads, None, scaling=0.3, examples=examples)
        return [out * own_BS[..., None, None], *torch.autograd.grad((out * weights).sum(), heads)]

    varlen = Varlen()
    for one, other in zip(of(Examples.of(batch, varlen)), of(Examples.of(batch)), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)
    assert kernel.windows == {(-1, 0)}
    assert varlen.refused is None


@pytest.mark.parametrize("family", ["llama", "gemma3", "bert", "mistral, window 4"])
def test_segments_have_the_gradient_of_examples_alone(
    tmp_path: Path, family: str, kernel: Kernel
) -> None:
    """Windows too, whose mask the kernel does not need."""
    model, split, varlen = _model(family, tmp_path), _split(), Varlen()
    alone = [_gradients(model, split, ((index,),)) for index in range(len(split))]
    expected = [torch.stack(parts).sum(0) for parts in zip(*alone, strict=True)]
    assert attend_by_example(model, True)
    for one, other in zip(_gradients(model, split, ROWS, varlen), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert varlen.refused is None
    if "window" in family:
        assert kernel.windows == {(3, 0)}


def test_what_is_no_window_keeps_its_mask(kernel: Kernel) -> None:
    """Chunks look like windows to transformers' `local_size`."""
    options: dict[str, Any] = {"batch_size": 1, "q_length": 12, "kv_length": 12, "local_size": 4}
    window = sliding_window_causal_mask_function(4)
    chunks = chunked_causal_mask_function(4, torch.zeros(1, dtype=torch.int64))
    assert getattr(mask(window, **options), WINDOW) == 4
    assert not hasattr(mask(chunks, **options), WINDOW)

    torch.manual_seed(0)
    heads = [torch.randn(1, 2, 12, 8) for _ in range(3)]
    split = TokenizedSplit.from_examples(
        [(np.zeros(6, np.int32), np.ones(6, bool)) for _ in range(2)]
    )
    batch = collate(split, range(2), ((0, 1),), 0, torch.device("cpu"))
    own = mask(chunks, **options)
    found, _ = attention(
        torch.nn.Module(), *heads, own, examples=Examples.of(batch, Varlen()), is_causal=True
    )
    together, _ = attention(
        torch.nn.Module(), *heads, own, examples=Examples.of(batch), is_causal=True
    )
    torch.testing.assert_close(found, together)
    assert not kernel.windows


@pytest.mark.parametrize("size", [8, 12])
def test_a_head_that_the_kernel_does_not_take_has_a_mask(size: int) -> None:
    """It notes why, so that the run gathers instead; float32 is one reason, 12 numbers another."""
    torch.manual_seed(0)
    split, varlen = _split(), Varlen()
    batch = collate(split, range(len(split)), ROWS, 0, torch.device("cpu"))
    own_BS = Examples.of(batch).owners_BS >= 0
    heads = [torch.randn(own_BS.shape[0], 2, own_BS.shape[1], size) for _ in range(3)]
    found, _ = attention(torch.nn.Module(), *heads, None, examples=Examples.of(batch, varlen))
    plain, _ = attention(torch.nn.Module(), *heads, None, examples=Examples.of(batch))
    torch.testing.assert_close(found[own_BS], plain[own_BS])
    assert varlen.refused == "heads are in torch.float32"
    if size % 8:
        with torch.autocast("cpu", torch.bfloat16):
            attention(torch.nn.Module(), *heads, None, examples=Examples.of(batch, varlen))
        assert varlen.refused == "heads have 12, 12, 12 numbers"


@pytest.mark.parametrize("window", [None, 16])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_kernel_takes_what_it_is_given(device: str, window: int | None) -> None:
    """Fake tensors run torch's own operator without a GPU; only those of a CPU have gradients."""
    split = _split()
    batch = collate(split, range(len(split)), ROWS, 0, torch.device("cpu"))
    rows, width = batch.tokens_BS.shape
    module: Any = torch.nn.Module()
    module.num_key_value_groups = 2
    trained, varlen = device == "cpu", Varlen()
    real = Segments.of(batch)
    with FakeTensorMode(), Operators() as seen, torch.set_grad_enabled(trained):
        starts_M = torch.empty(real.starts_M.shape, dtype=torch.int32, device=device)
        owners_BS = torch.zeros(rows, width, dtype=torch.int64, device=device)
        examples = Examples((), None, owners_BS, Segments(starts_M, real.longest), varlen)
        options: dict[str, Any] = {"dtype": torch.bfloat16, "device": device}
        heads = [
            torch.empty(rows, count, width, 64, requires_grad=trained, **options)
            for count in (4, 2, 2)
        ]
        own = None
        if window is not None:
            own = torch.ones(rows, 1, width, width, dtype=torch.bool, device=device)
            setattr(own, WINDOW, window)
        out, _ = attention(module, *heads, own, examples=examples)
        assert (out.shape, out.device.type) == ((rows, width, 4, 64), device)
        if trained:
            gradients = torch.autograd.grad(out.sum(), heads)
            assert [g.shape for g in gradients] == [h.shape for h in heads]
            assert "torch_attn::_varlen_attn_backward" in seen.names
    assert "torch_attn::_varlen_attn" in seen.names
    assert not any("index_select" in name or "scaled_dot" in name for name in seen.names)
    assert varlen.refused is None


class Operators(TorchDispatchMode):
    """Which operators run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("way", ["right", "wrong", "refused"])
def test_a_run_uses_the_kernel_where_it_computes_the_same(
    way: str, tmp_path: Path, kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("raytune_ft.train.setup.has_varlen", lambda device: True)
    if way == "wrong":
        kernel._scaled_by = 1.5
    if way == "refused":
        monkeypatch.setattr("raytune_ft.model.attention._not_for_varlen", lambda *heads: "no")
    notes: list[tuple[str, ...]] = []

    def train(runner: Any, *arguments: Any) -> None:
        notes.append(runner.notes)
        assert (runner.varlen is not None) == (way == "right")
        raise RunFailed("enough")

    monkeypatch.setattr("raytune_ft.train.run.train", train)
    config = make_config(*make_inputs(tmp_path), {"train.precision": "bfloat16"})
    run(config, tmp_path / "run")
    told = [note for note in notes[0] if "varlen kernel" in note]
    assert len(told) == (way != "right")


def test_flash_attention_of_transformers_packs_several_rows(
    tmp_path: Path, kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By itself it tells examples apart in a single row only, so that packing would be refused."""

    def flash(
        module: Any, query: Tensor, key: Tensor, value: Tensor, given: Any, **named: Any
    ) -> tuple[Tensor, None]:
        rows, _, width, _ = query.shape
        starts, longest = named.get("cu_seq_lens_q"), named.get("max_length_q", width)
        if starts is None:
            starts = torch.arange(0, rows * width + 1, width, dtype=torch.int32)
        flat = [each.transpose(1, 2).flatten(0, 1) for each in (query, key, value)]
        options: dict[str, Any] = {"scale": named["scaling"], "enable_gqa": True}
        out = kernel(*flat, starts, starts, longest, longest, window_size=(-1, 0), **options)
        return out.unflatten(0, (rows, width)), None

    monkeypatch.setitem(AttentionInterface._global_mapping, FLASH, flash)
    allowed = staticmethod(lambda *arguments, **named: FLASH)
    monkeypatch.setattr(PreTrainedModel, "_check_and_adjust_attn_implementation", allowed)
    packed: list[bool] = []

    def train(runner: Any, *arguments: Any) -> None:
        assert runner.model.get_base_model().config._attn_implementation == FLASH
        packed.append(runner.packing and runner.flash)
        raise RunFailed("enough")

    monkeypatch.setattr("raytune_ft.train.run.train", train)
    changes = {"model.attention": FLASH, "data.packing": True}
    config = make_config(*make_inputs(tmp_path), changes)
    run(config, tmp_path / "run")
    assert packed == [True]
    monkeypatch.setattr("raytune_ft.train.setup.takes_segments", lambda model: False)
    with pytest.raises(ConfigError, match=r"data\.packing=true would change the numbers"):
        run(config, tmp_path / "again")
