"""The probe finds what a list of model names would have to know."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    GPT2Config,
    MistralConfig,
    OPTConfig,
)

from raytune_ft.config.schema import Config
from raytune_ft.data.batch import MicroBatch
from raytune_ft.errors import ConfigError, ModelError
from raytune_ft.model.load import UNSUPPORTED, Precision
from raytune_ft.model.meta import build
from raytune_ft.model.probe import Logits, Probe
from raytune_ft.strategy.single import Single
from raytune_ft.train.model_runner import ModelRunner
from raytune_ft.train.optim import build_optimizer
from raytune_ft.train.setup import build_runner
from tests.support.families import save_tiny_family
from tests.support.models import VOCABULARY, save_character_tokenizer, save_tiny
from tests.support.runs import make_config, make_inputs

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
FAMILIES: dict[str, tuple[Callable[[], object], bool]] = {
    "gpt2": (lambda: GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4), True),
    "opt": (
        lambda: OPTConfig(vocab_size=VOCABULARY, ffn_dim=48, max_position_embeddings=64, **SMALL),
        True,
    ),
    "bloom": (
        lambda: BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4),
        False,
    ),
}


def _save(family: str, directory: Path) -> Path:
    return _save_as(FAMILIES[family][0](), directory)


def _save_as(config: object, directory: Path) -> Path:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)  # so that a leak is no rounding error
    model.save_pretrained(directory)
    save_character_tokenizer(directory)
    return directory


def _engine(config: Config) -> ModelRunner:
    built = build(config.model, config.method, config.train.precision, config.seed, False)
    strategy = Single(config.parallel, config.train.precision)
    return build_runner(built, config, strategy, partial(build_optimizer, train=config.train))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_inputs(tmp_path_factory.mktemp("inputs"))[1]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_auto_packs_only_where_it_is_exact(
    tmp_path: Path, data: Path, family: str, precision: str
) -> None:
    changes = {"method": {"name": "full"}, "train.precision": precision}
    config = make_config(_save(family, tmp_path / family), data, changes)
    assert _engine(config).packing is FAMILIES[family][1]


def test_llama_packs_in_every_precision(tmp_path: Path) -> None:
    inputs = make_inputs(tmp_path)
    for precision in ("float32", "bfloat16"):
        config = make_config(*inputs, {"train.precision": precision})
        assert _engine(config).packing is True


def test_attention_that_packs_single_rows_only_is_found(tmp_path: Path) -> None:
    """As some kernels do: positions are obeyed in a batch of one row and ignored otherwise."""
    engine = _engine(make_config(*make_inputs(tmp_path)))

    def logits(batch: MicroBatch, keep_BS: Tensor) -> Tensor:
        several = batch.positions_BS is not None and len(batch.tokens_BS) > 1
        return engine.logits(replace(batch, positions_BS=None) if several else batch, keep_BS)

    device = torch.device("cpu")
    assert Probe(engine.logits, VOCABULARY, "float32", device).against_packing() is None
    reason = Probe(logits, VOCABULARY, "float32", device).against_packing()
    assert reason is not None
    assert "attend across examples" in reason


class Noisy:
    """Logits with the noise of kernels that sum in another order for every shape of a batch."""

    def __init__(self, logits: Logits, size: float) -> None:
        self._logits, self._size = logits, size
        self._spread: Tensor | None = None  # of the first call

    def __call__(self, batch: MicroBatch, keep_N: Tensor) -> Tensor:
        logits_NV = self._logits(batch, keep_N)
        rows, width = batch.tokens_BS.shape
        rng = torch.Generator().manual_seed(1000 * rows + width)
        noise_NV = torch.randn(logits_NV.shape, generator=rng)
        self._spread = logits_NV.std() if self._spread is None else self._spread
        return logits_NV + self._size * self._spread * noise_NV


def test_noise_of_kernels_is_no_reason_against_packing(tmp_path: Path) -> None:
    """At its largest it is above the bound of bfloat16."""
    engine = _engine(make_config(*make_inputs(tmp_path), {"train.precision": "bfloat16"}))
    device = torch.device("cpu")

    def against(logits: Logits, precision: Precision = "bfloat16") -> str | None:
        return Probe(logits, VOCABULARY, precision, device).against_packing()

    def leaking(batch: MicroBatch, keep_N: Tensor) -> Tensor:
        """One row, and so one document: attention and positions go on in the next one."""
        packed = batch.positions_BS is not None
        return engine.logits(replace(batch, positions_BS=None) if packed else batch, keep_N)

    def shifted(batch: MicroBatch, keep_N: Tensor) -> Tensor:
        """Logits of other words where rows are packed."""
        logits_NV = engine.logits(batch, keep_N)
        return logits_NV if batch.positions_BS is None else logits_NV + 0.2 * logits_NV.roll(1, 1)

    assert against(Noisy(engine.logits, 0.02)) is None
    assert "positions in a packed row differ" in str(against(Noisy(engine.logits, 0.02), "float32"))
    assert "attend across examples" in str(against(Noisy(leaking, 0.02)))
    assert "positions in a packed row differ" in str(against(Noisy(shifted, 0.02)))
    assert "positions in a packed row differ" in str(against(Noisy(engine.logits, 0.2)))


def test_packing_true_refuses(tmp_path: Path, data: Path) -> None:
    changes = {"method": {"name": "full"}, "data.packing": True}
    config: Config = make_config(_save("bloom", tmp_path / "bloom"), data, changes)
    with pytest.raises(ConfigError, match=r"data.packing=true would change the numbers"):
        _engine(config)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_model_whose_tokens_see_their_targets_is_refused(
    tmp_path: Path, data: Path, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also one that no list names; an encoder is known by its configuration."""
    monkeypatch.delitem(UNSUPPORTED, "cpmant")
    changes = {"train.precision": precision}
    decoder = save_tiny("bert", tmp_path / "decoder")
    assert _engine(make_config(decoder, data, changes)).packing is True
    encoder = save_tiny("bert", tmp_path / "encoder", is_decoder=False)
    for base in (encoder, save_tiny_family("cpmant", tmp_path / "unlisted")):
        with pytest.raises(ModelError, match=r"sees the tokens that it has to predict"):
            _engine(make_config(base, data, changes))


PREFERENCES = {"train.objective": "dpo", "data.train.format": "preference"}


@pytest.mark.parametrize(
    ("changes", "shares"),
    [
        (PREFERENCES, True),
        (PREFERENCES | {"train.precision": "bfloat16"}, True),
        (PREFERENCES | {"data.packing": False}, False),
        (PREFERENCES | {"train.neftune_alpha": 5.0}, False),
        (PREFERENCES | {"method.dropout": 0.1}, False),
        (PREFERENCES | {"method": {"name": "loreft", "rank": 2}}, False),
        ({}, False),
    ],
)
def test_prompts_are_computed_once_where_nothing_else_changes(
    tmp_path: Path, changes: dict[str, object], shares: bool
) -> None:
    """Noise would be drawn once for two answers, and hooks look for the tokens of a prompt."""
    assert _engine(make_config(*make_inputs(tmp_path), changes)).shares is shares


@pytest.mark.parametrize(("window", "same"), [(64, True), (16, False)])
def test_a_window_over_a_row_is_found(tmp_path: Path, window: int, same: bool) -> None:
    """It counts the tokens of other answers between an answer and its prompt."""
    config = MistralConfig(
        vocab_size=VOCABULARY, num_key_value_heads=2, sliding_window=window, **SMALL
    )
    model = _save_as(config, tmp_path / "windows")
    engine = _engine(make_config(model, make_inputs(tmp_path)[1], PREFERENCES))
    assert engine.packing
    probe = Probe(replace(engine, shares=True).logits, VOCABULARY, "float32", torch.device("cpu"))
    assert (probe.against_packing(40, [window] if window < 40 else [], shared=True) is None) is same
