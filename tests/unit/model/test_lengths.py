"""Rotary positions that depend on the longest row of a pass: every row is computed by its own."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from raytune_ft.data.batch import FREELY, Apart, lay_out
from raytune_ft.data.prepare import prepare_data
from raytune_ft.data.prepared import open_prepared
from raytune_ft.model.lengths import apart_of, notes_of, thresholds_of, usable_positions
from raytune_ft.model.load import load_tokenizer
from raytune_ft.packed.layout import plan_pass
from tests.support.models import FAMILIES, save_tiny, true_float64
from tests.support.packed import run_packed
from tests.support.runs import evaluations, final_weights, losses, make_config, run

THRESHOLD = 32
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "partial_rotary_factor": 1.0,
    "short_factor": [1.0] * 4,
    "long_factor": [1.5, 2.0, 4.0, 8.0],
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 8.0}
BASES: dict[str, tuple[str, dict[str, Any]]] = {
    "longrope": (
        "phi3",
        {"rope_parameters": LONGROPE, "original_max_position_embeddings": THRESHOLD},
    ),
    "dynamic": ("llama", {"rope_parameters": DYNAMIC, "max_position_embeddings": THRESHOLD}),
}
LAYOUTS: dict[str, dict[str, Any]] = {
    "alone": {"train.micro_tokens": 1, "data.packing": False},
    "some": {"train.micro_tokens": 128, "data.packing": False},
    "all": {"train.micro_tokens": 4096, "data.packing": False},
    "packed": {"train.micro_tokens": 4096, "data.packing": True},
}
WELL = {"train.precision": "float64", "train.max_examples": 40, "train.adam_epsilon": 1e-6}


@pytest.fixture(params=BASES)
def inputs(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Path]:
    """Rows of 12 to 120 tokens, among them some of the threshold and one more."""
    family, changes = BASES[request.param]
    rng = np.random.default_rng(0)
    lengths = [*rng.integers(12, THRESHOLD, 12), *rng.integers(40, 120, 8)]
    lengths += [THRESHOLD, THRESHOLD + 1, 60, 60]
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    rows = [
        {"prompt": "ab", "completion": "".join(rng.choice(letters, length - 4))}
        for length in lengths
    ]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return save_tiny(family, tmp_path / "model", **changes), data


def _alone(model: Path, cache: Path) -> float:
    """The loss of plain transformers, a new model for every row."""
    split, total = open_prepared(cache).validation, 0.0
    for i in range(len(split)):
        ids, mask = split.example(i)
        built = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64)
        logits = built(torch.tensor(ids)[None].long(), use_cache=False).logits[0, :-1]
        chosen = torch.tensor(mask[1:])
        targets = torch.tensor(ids[1:]).long()[chosen]
        total += torch.nn.functional.cross_entropy(logits[chosen], targets, reduction="sum").item()
    return total / int(split.label_counts.sum())


def test_losses_are_those_of_every_row_alone(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    with true_float64(), torch.no_grad():
        config = make_config(*inputs, {**WELL, "data.validation": 0.5})
        data = prepare_data(config.data, load_tokenizer(config.model), 0, tmp_path / "alone")
        alone = _alone(inputs[0], data.path)
    for name, layout in LAYOUTS.items():
        changed = make_config(*inputs, {**WELL, "data.validation": 0.5, **layout})
        with true_float64():
            result = run(changed, tmp_path / name)
        assert result.base is not None
        assert abs(result.base["eval_loss"] - alone) < 1e-9, name
        assert any("longest row" in note for note in result.notes)
        ours, theirs = tmp_path / name, tmp_path / "alone"
        if name == "alone":
            continue
        assert max(np.abs(np.subtract(losses(ours), losses(theirs)))) < 1e-9
        assert max(np.abs(np.subtract(evaluations(ours), evaluations(theirs)))) < 1e-9
        for key, weight in final_weights(theirs).items():
            assert (final_weights(ours)[key] - weight).abs().max() < 1e-9


def test_packed_trials_are_what_they_are_alone(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    configs = {
        str(rank): make_config(*inputs, {**WELL, "method.rank": rank, "train.batch_size": 3 * rank})
        for rank in (1, 2)
    }
    with true_float64():
        run_packed(configs, tmp_path / "packed", rank=2)
        for name, config in configs.items():
            run(config, tmp_path / "alone" / name)
            ours, theirs = tmp_path / "packed" / name, tmp_path / "alone" / name
            assert max(np.abs(np.subtract(losses(ours), losses(theirs)))) < 1e-9
            assert max(np.abs(np.subtract(evaluations(ours), evaluations(theirs)))) < 1e-9


def test_a_dependence_on_length_that_no_rule_names_is_found(
    inputs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("raytune_ft.train.setup.apart_of", lambda config: FREELY)
    for name in ("alone", "some"):
        with true_float64():
            result = run(make_config(*inputs, {**WELL, **LAYOUTS[name]}), tmp_path / name)
        assert any("rows of different lengths do not share" in note for note in result.notes)
    ours, theirs = losses(tmp_path / "some"), losses(tmp_path / "alone")
    assert max(np.abs(np.subtract(ours, theirs))) < 1e-9


def test_configurations_are_read() -> None:
    config = FAMILIES["phi3"]()
    assert apart_of(config) == FREELY
    assert notes_of(config, (1, 1000)) == ()
    for key, value in BASES["longrope"][1].items():
        setattr(config, key, value)
    config.standardize_rope_params()
    assert apart_of(config) == Apart((THRESHOLD,))
    assert notes_of(config, (1, THRESHOLD)) == notes_of(config, (THRESHOLD + 1, 99)) == ()
    assert len(notes_of(config, (THRESHOLD, THRESHOLD + 1))) == 1
    assert thresholds_of(config, 33) == [THRESHOLD]
    assert thresholds_of(FAMILIES["mistral"](), 1000) == [12, 256]


def test_layouts_keep_examples_apart() -> None:
    lengths = [5, 40, 7, 32, 33, 40, 6]
    apart = Apart((32,))
    assert apart | Apart((8,), 50) == Apart((8, 32), 50)
    for packing in (False, True):
        for rank in lay_out(lengths, 2, 1000, packing, apart):
            for batch in rank:
                groups = {apart.group(lengths[i]) for row in batch for i in row}
                assert len(groups) <= 1
    each = lay_out([40, 40, 33, 32, 5, 6], 1, 1000, True, Apart((), 32))[0]
    assert sorted(each) == [((0,), (1,)), ((2,),), ((3,), (5, 4))]


def test_a_packed_pass_keeps_examples_apart() -> None:
    waiting = [[40, 33, 9, 8], [31, 5]]
    apart = Apart((32,))
    for packing in (False, True):
        left, taken = [list(each) for each in waiting], 0
        while any(left):
            first = next(i for i, each in enumerate(left) if each)
            plan = plan_pass(left[first:], 200, packing, apart=apart)
            seen = set()
            for slot, rows in enumerate(plan.rows, start=first):
                places = [place for row in rows for place in row]
                seen |= {apart.group(left[slot][place]) for place in places}
                left[slot] = [n for i, n in enumerate(left[slot]) if i not in places]
                taken += len(places)
            assert len(seen) == 1
        assert taken == 6


SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "max_position_embeddings": 66,
    "pad_token_id": 2,
}
HEADED = {
    "roberta": (transformers.RobertaConfig(**SIZES), 63),
    "xlm-roberta": (transformers.XLMRobertaConfig(**SIZES), 63),
    "longformer": (transformers.LongformerConfig(**SIZES, attention_window=8), 63),
    "mpnet": (transformers.MPNetConfig(**SIZES), 64),  # its padding is always 1
    "bert": (transformers.BertConfig(**SIZES), 66),
    "bart": (
        transformers.BartConfig(
            **SIZES, d_model=32, encoder_layers=1, decoder_layers=1, eos_token_id=3
        ),
        66,
    ),
    "opt": (transformers.OPTConfig(**SIZES, ffn_dim=48, word_embed_proj_dim=32), 66),
    "llama": (transformers.LlamaConfig(**SIZES), 66),
    "dynamic": (transformers.LlamaConfig(**SIZES, rope_parameters=DYNAMIC), 66 * 8),
}


@pytest.mark.parametrize("family", HEADED)
def test_usable_positions_are_those_that_a_forward_takes(family: str) -> None:
    config, usable = HEADED[family]
    model = AutoModelForSequenceClassification.from_config(config).eval()
    assert usable_positions(model) == usable
    for length in (usable, usable + 1):
        ids = torch.full((1, length), 5)
        ids[:, -1] = 3
        absolute = "llama" not in family and family != "dynamic"
        with (
            pytest.raises((IndexError, RuntimeError))
            if length > usable and absolute
            else nullcontext()
        ):
            model(input_ids=ids)


def test_a_table_of_positions_that_is_computed_limits_no_row() -> None:
    config = transformers.XGLMConfig(
        vocab_size=96, d_model=32, ffn_dim=48, num_layers=1, attention_heads=4, pad_token_id=2
    )
    model = transformers.XGLMForCausalLM(config).eval()
    assert usable_positions(model) == config.max_position_embeddings


def test_positions_of_an_image_tower_limit_no_row() -> None:
    vision = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 14}
    text = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 96}
    config = transformers.Gemma3Config(
        text_config=text, vision_config=vision | {"image_size": 28, "intermediate_size": 16}
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert usable_positions(model) == config.get_text_config().max_position_embeddings
