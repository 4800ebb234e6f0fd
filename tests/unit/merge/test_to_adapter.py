"""Merged adapters as one adapter, loaded by PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from raytune_ft.config.schema import ModelConfig
from raytune_ft.errors import ModelError, StorageError
from raytune_ft.merge.methods import (
    LINEAR,
    TASK_ARITHMETIC,
    TIES,
    Formula,
    MergeSettings,
)
from raytune_ft.merge.to_adapter import refactor
from tests.support.merges import merge_tensors
from tests.support.models import save_tiny, save_tiny_llama
from tests.unit.merge.test_fold_variants import adapt, loaded, merged_by_peft

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")
KINDS: list[dict[str, Any]] = [
    {"r": 2, "target_modules": ["q_proj", "embed_tokens"]},
    {"r": 4, "target_modules": ["q_proj", "down_proj"], "use_rslora": True},
    {"r": 3, "target_modules": ["down_proj"], "alpha_pattern": {"down_proj": 5}},
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("factors") / "base")


@pytest.fixture(scope="module")
def members(base: Path) -> list[Path]:
    return [adapt(base, base.parent / f"adapter{i}", **kind) for i, kind in enumerate(KINDS)]


@pytest.mark.parametrize("formula", [LINEAR, TASK_ARITHMETIC])
def test_a_sum_of_deltas_fits_the_sum_of_ranks(
    tmp_path: Path, base: Path, members: list[Path], formula: Formula
) -> None:
    settings = MergeSettings(weights=(1, 2, 3))
    model = ModelConfig(path=str(base))
    made = refactor(model, members, tmp_path / "out", 9, formula, settings)
    assert made.lost < 1e-6
    states, origin = [merged_by_peft(base, member) for member in members], loaded(base)
    found = merged_by_peft(base, tmp_path / "out")
    for name, weight in found.items():
        expected = merge_tensors(formula, [s[name] for s in states], origin[name], settings)
        torch.testing.assert_close(weight, expected, rtol=0, atol=1e-5, msg=name)


def test_a_smaller_rank_is_the_nearest(tmp_path: Path, base: Path, members: list[Path]) -> None:
    made = refactor(ModelConfig(path=str(base)), members, tmp_path / "out", 2)
    states, origin = [merged_by_peft(base, member) for member in members], loaded(base)
    found = merged_by_peft(base, tmp_path / "out")
    left = total = 0.0
    for name, weight in found.items():
        delta = sum((s[name] - origin[name] for s in states), torch.zeros_like(weight)) / 3
        if not delta.any() or delta.ndim < 2:
            continue
        u, s, vh = torch.linalg.svd(delta)
        nearest = u[:, :2] * s[:2] @ vh[:2]
        torch.testing.assert_close(weight - origin[name], nearest, rtol=0, atol=1e-5, msg=name)
        left += s[2:].square().sum().item()
        total += s.square().sum().item()
    assert made.lost == pytest.approx((left / total) ** 0.5, rel=1e-3)
    assert made.lost > 0.05


def test_merges_that_are_no_sum_and_dora(tmp_path: Path, base: Path, members: list[Path]) -> None:
    dora = adapt(base, tmp_path / "dora", r=2, target_modules=["q_proj"], use_dora=True)
    both = [members[1], dora]
    made = refactor(ModelConfig(path=str(base)), both, tmp_path / "out", 32, TIES)
    assert made.lost < 1e-4  # the width of the model is 32
    states, origin = [merged_by_peft(base, member) for member in both], loaded(base)
    name = "model.layers.1.self_attn.q_proj.weight"
    expected = merge_tensors(TIES, [s[name] for s in states], origin[name])
    weight = merged_by_peft(base, tmp_path / "out")[name]
    different = ~torch.isclose(weight, expected, rtol=0, atol=1e-4)
    assert different.sum() <= 2  # at the very threshold


def test_transposed_layers(tmp_path: Path) -> None:
    base = save_tiny("gpt2", tmp_path / "base")
    lora = {"target_modules": ["c_attn"], "fan_in_fan_out": True}
    members = [adapt(base, tmp_path / f"a{r}", r=r, **lora) for r in (2, 3)]
    refactor(ModelConfig(path=str(base)), members, tmp_path / "out", 5)
    states = [merged_by_peft(base, member) for member in members]
    name = "transformer.h.0.attn.c_attn.weight"
    found = merged_by_peft(base, tmp_path / "out")[name]
    torch.testing.assert_close(found, (states[0][name] + states[1][name]) / 2, rtol=0, atol=1e-5)


def test_what_has_no_factors_is_refused(tmp_path: Path, base: Path, members: list[Path]) -> None:
    model = ModelConfig(path=str(base))
    saved = adapt(base, tmp_path / "saved", target_modules=["q_proj"], modules_to_save=["lm_head"])
    with pytest.raises(ModelError, match=r"changes lm_head\.weight by more than two factors"):
        refactor(model, [members[0], saved], tmp_path / "out", 4)
    with pytest.raises(ModelError, match="is a whole model, not an adapter"):
        refactor(model, [base], tmp_path / "out", 4)
    with pytest.raises(StorageError, match="adapter0 exists"):
        refactor(model, members, members[0], 4)
    assert not (tmp_path / "out").exists()
