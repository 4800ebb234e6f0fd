"""Merges of real (tiny) checkpoints on the disk: whole models, and adapters of different ranks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, OFTConfig, VeraConfig
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from raytune_ft.config.merging import MERGES
from raytune_ft.config.schema import ModelConfig
from raytune_ft.errors import CheckpointError, ConfigError, MergeError, ModelError
from raytune_ft.merge import members as walk
from raytune_ft.merge import streaming_forward as weights_module
from raytune_ft.merge.merge import merge
from raytune_ft.merge.methods import MergeSettings
from tests.support.merges import merge_tensors
from tests.support.models import save_tiny, save_tiny_llama
from tests.unit.merge.test_fold_variants import TOKENS, adapt, adapt_by, loaded, merged_by_peft

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights_module, "CHUNK", 3000)
    monkeypatch.setattr(walk, "CHUNK", 3000)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("merge") / "base")


@pytest.fixture(scope="module")
def adapters(base: Path) -> list[Path]:
    """Of ranks 2, 4 and 7, one of them DoRA, one of them on fewer modules."""
    kinds = [
        {"r": 2, "target_modules": ["q_proj", "down_proj"]},
        {"r": 4, "target_modules": "all-linear", "use_dora": True},
        {"r": 7, "target_modules": ["down_proj"], "use_rslora": True},
    ]
    return [adapt(base, base.parent / f"adapter{i}", **kind) for i, kind in enumerate(kinds)]


@pytest.fixture(scope="module")
def vectors(base: Path) -> list[Path]:
    """Methods that PEFT merges layer by layer, beside LoRA."""
    linear: Any = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "down_proj"]}
    kinds = [
        IA3Config(**linear, feedforward_modules=["down_proj"]),
        VeraConfig(**linear, r=8),
        OFTConfig(**linear, oft_block_size=8),
        LoraConfig(**linear, r=2),
    ]
    return [adapt_by(kind, base, base.parent / f"vectors{i}") for i, kind in enumerate(kinds)]


@pytest.fixture(scope="module")
def tuned(base: Path) -> list[Path]:
    """Whole models near the base, in bfloat16."""
    paths = []
    for index in range(3):
        torch.manual_seed(index)
        model = AutoModelForCausalLM.from_pretrained(base)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
        paths.append(base.parent / f"tuned{index}")
        model.save_pretrained(paths[-1])
    return paths


SIMPLE = [name for name in MERGES if name not in ("best", "greedy_soup", "wise_ft")]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *((n, "adapters") for n in SIMPLE),
        *((n, kind) for n in ("uniform_soup", "slerp") for kind in ("tuned", "vectors")),
        ("task_arithmetic", "vectors"),
    ],
)
def test_a_merge_is_the_formula_on_folded_weights(
    tmp_path: Path, base: Path, name: str, kind: str, request: pytest.FixtureRequest
) -> None:
    members: list[Path] = request.getfixturevalue(kind)
    settings = MergeSettings(seed=4)
    model = ModelConfig(path=str(base))
    report = merge(model, members, tmp_path / "out", name, TOKENS, settings=settings)
    used = members[:2] if name == "slerp" else members
    assert report.members == tuple(range(len(used)))
    states = [loaded(m) if kind == "tuned" else merged_by_peft(base, m) for m in used]
    origin, found = loaded(base), loaded(tmp_path / "out")
    formula = MERGES[name].formula
    assert formula is not None
    assert found.keys() == origin.keys()
    for weight, value in found.items():
        expected = merge_tensors(
            formula(), [s[weight] for s in states], origin[weight], settings, weight
        )
        # A magnitude at the very threshold may fall on the other side by rounding.
        different = ~torch.isclose(value, expected, rtol=0, atol=1e-5)
        assert different.sum() <= (3 if "ties" in name else 0), weight
    assert report.check.written_difference <= report.check.tolerance
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert manifest["members"] == [str(path) for path in used]


def test_best_is_the_fold_of_the_first(tmp_path: Path, base: Path, adapters: list[Path]) -> None:
    model = ModelConfig(path=str(base))
    merge(model, adapters, tmp_path / "out", "best", TOKENS)
    expected = merged_by_peft(base, adapters[0])
    for name, weight in loaded(tmp_path / "out").items():
        torch.testing.assert_close(weight, expected[name], rtol=0, atol=1e-5)


def test_a_greedy_soup_adds_what_improves(tmp_path: Path, base: Path, tuned: list[Path]) -> None:
    """Scored by the distance from a goal: between the first and the third, far from the second."""
    first, third = loaded(tuned[0]), loaded(tuned[2])
    name = "model.layers.0.mlp.up_proj.weight"
    goal = 0.6 * first[name] + 0.4 * third[name]
    seen: list[Path] = []

    def score(directory: Path) -> float:
        seen.append(directory)
        return (loaded(directory)[name] - goal).norm().item()

    model = ModelConfig(path=str(base))
    report = merge(model, tuned, tmp_path / "out", "greedy_soup", TOKENS, score)
    assert report.members == (0, 2)
    assert [tried.members for tried in report.tried] == [(0,), (0, 1), (0, 2)]
    assert report.tried[1].score > report.tried[0].score > report.tried[2].score
    soup = (first[name] + third[name]) / 2
    torch.testing.assert_close(loaded(tmp_path / "out")[name], soup, rtol=0, atol=1e-6)
    assert not any(path.exists() for path in seen)  # they were moved or deleted
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_wise_ft_keeps_the_best_share(tmp_path: Path, base: Path, adapters: list[Path]) -> None:
    name = "model.layers.1.mlp.down_proj.weight"
    origin, tuned_weight = loaded(base)[name], merged_by_peft(base, adapters[0])[name]
    goal = 0.3 * tuned_weight + 0.7 * origin

    def score(directory: Path) -> float:
        return (loaded(directory)[name] - goal).norm().item()

    model = ModelConfig(path=str(base))
    alphas = (0.0, 0.3, 0.6, 1.0)
    report = merge(model, adapters, tmp_path / "out", "wise_ft", TOKENS, score, alphas=alphas)
    assert report.alpha == 0.3
    assert [tried.alpha for tried in report.tried] == list(alphas)
    assert report.tried[1].score < 1e-5
    torch.testing.assert_close(loaded(tmp_path / "out")[name], goal, rtol=0, atol=1e-6)


def test_tied_and_untied_members(tmp_path: Path) -> None:
    base = save_tiny_llama(tmp_path / "base", tied=True)
    members = [
        adapt(base, tmp_path / "head", target_modules=["lm_head"]),
        adapt(base, tmp_path / "plain", target_modules=["q_proj"]),
    ]
    model = ModelConfig(path=str(base))
    merge(model, members, tmp_path / "out", "uniform_soup", TOKENS)
    found, origin = loaded(tmp_path / "out"), loaded(base)
    head = merged_by_peft(base, members[0])["lm_head.weight"]
    assert torch.equal(found["model.embed_tokens.weight"], origin["model.embed_tokens.weight"])
    expected: Tensor = (head + origin["lm_head.weight"]) / 2
    torch.testing.assert_close(found["lm_head.weight"], expected, rtol=0, atol=1e-6)


def test_members_that_do_not_fit_are_refused(
    tmp_path: Path, base: Path, tuned: list[Path], adapters: list[Path]
) -> None:
    model = ModelConfig(path=str(base))
    other = save_tiny_llama(tmp_path / "other", seed=1)
    foreign = adapt(other, tmp_path / "foreign", target_modules=["q_proj"])
    with pytest.raises(ModelError, match=r"foreign is an adapter of .*other, and .* is one of"):
        merge(model, [adapters[0], foreign], tmp_path / "out", "ties", TOKENS)
    wider = save_tiny("llama", tmp_path / "wider", intermediate_size=64)
    with pytest.raises(
        ModelError, match=r"holds .*gate_proj.* in the shape \[128, 32\]|in the sha"
    ):
        merge(model, [tuned[0], wider], tmp_path / "out", "uniform_soup", TOKENS)
    deeper = save_tiny("llama", tmp_path / "deeper", num_hidden_layers=3)
    with pytest.raises(ModelError, match=r"holds other tensors than its base \(model\.layers\.2"):
        merge(model, [deeper, tuned[0]], tmp_path / "out", "uniform_soup", TOKENS)
    renamed = Path(shutil.copytree(tuned[0], tmp_path / "renamed"))
    tokenizer = json.loads((base / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (renamed / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ModelError, match=r"renamed/tokenizer\.json is another tokenizer"):
        merge(model, [tuned[1], renamed], tmp_path / "out", "uniform_soup", TOKENS)
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="holds neither config"):
        merge(model, [tmp_path / "empty"], tmp_path / "out", "uniform_soup", TOKENS)
    assert not (tmp_path / "out").exists()


def test_a_member_with_nan_is_refused(tmp_path: Path, base: Path, tuned: list[Path]) -> None:
    broken = Path(shutil.copytree(tuned[0], tmp_path / "broken"))
    weights = load_file(broken / "model.safetensors")
    weights["model.norm.weight"][0] = float("inf")
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(MergeError, match=r"model\.norm\.weight is not finite"):
        merge(
            ModelConfig(path=str(base)),
            [tuned[1], broken],
            tmp_path / "out",
            "uniform_soup",
            TOKENS,
        )
    assert not (tmp_path / "out/manifest.json").exists()


def test_what_a_merge_asks_for(tmp_path: Path, base: Path, tuned: list[Path]) -> None:
    model = ModelConfig(path=str(base))
    with pytest.raises(ConfigError, match=r"promote\.merge=slerp takes 2 models, and there are 1"):
        merge(model, tuned[:1], tmp_path / "out", "slerp", TOKENS)
    with pytest.raises(ConfigError, match=r"promote\.merge=average is not a merge; write one of b"):
        merge(model, tuned, tmp_path / "out", "average", TOKENS)
    with pytest.raises(ConfigError, match="greedy_soup chooses by a score"):
        merge(model, tuned, tmp_path / "out", "greedy_soup", TOKENS)
