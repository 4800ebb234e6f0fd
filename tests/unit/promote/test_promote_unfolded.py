"""What cannot be folded is promoted as the adapter that it is."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from raytune_ft.config.schema import ModelConfig
from raytune_ft.errors import ModelError
from raytune_ft.evaluate.context import runner_of
from raytune_ft.evaluate.evaluate import evaluate_directory
from raytune_ft.evaluate.generate import with_transformers
from raytune_ft.merge.export import export
from raytune_ft.model.load import load_tokenizer
from raytune_ft.promote.promote import promote
from tests.support.trained import Train, config_of

DOCS = Path(__file__).parents[3] / "docs" / "interventions.md"
LR = "train.lr=3e-2"


@pytest.mark.parametrize("name", ["loreft", "adapter", "prefix"])
def test_an_adapter_is_promoted(train: Train, inputs: Path, tmp_path: Path, name: str) -> None:
    run_dir = train(f"with-{name}", f"method.name={name}", LR)
    told: list[str] = []
    promotion = promote(run_dir, tell=told.append)
    assert promotion.model == run_dir / "promoted" / "adapter"
    assert not (run_dir / "promoted" / "model").exists()
    assert any("cannot be folded: adapter holds it" in line for line in told)
    content = json.loads((run_dir / "promoted" / "evaluation.json").read_text())
    assert content["promoted"]["eval_loss"] < content["base"]["eval_loss"]
    card = (run_dir / "promoted" / "README.md").read_text()
    assert ("PeftModel.from_pretrained" if name == "prefix" else "interventions.md") in card
    _, _, again = evaluate_directory(promotion.model, config_of(run_dir), tmp_path / "cache")
    assert again["eval_loss"] == pytest.approx(content["promoted"]["eval_loss"], abs=1e-6)
    with pytest.raises(ModelError, match="works on activations, and cannot be folded"):
        export(promotion.model, tmp_path / "out", base=str(inputs / "base"))
    export(promotion.model, tmp_path / "copy", "adapter")
    # Loaded as the documentation does it, it says what was measured.
    loaded = _loaded(name, tmp_path / "copy", inputs / "base")
    ids = torch.tensor([[5, 6, 7, 8, 9, 10]])
    ours = _loaded_by_us(promotion.model, inputs / "base")
    made = loaded.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=6,
        do_sample=False,
        eos_token_id=None,
    )
    assert made[0, 6:].tolist() == ours(ids)


def _loaded(name: str, folder: Path, base: Path) -> Any:
    if name == "prefix":
        plain = AutoModelForCausalLM.from_pretrained(base)
        return PeftModel.from_pretrained(plain, str(folder)).eval()
    block = re.search(r"^```python\n(.*?)^```$", DOCS.read_text(), re.M | re.S)
    assert block is not None
    space: dict[str, Any] = {}
    exec(compile(block[1], "interventions.md", "exec"), space)
    return space[f"load_{name}"](folder)


def _loaded_by_us(folder: Path, base: Path) -> Any:
    plain, own = ModelConfig(path=str(base)), ModelConfig(path=str(folder))
    engine = runner_of(own, load_tokenizer(plain), plain)
    return lambda ids: with_transformers(engine, own, ids.tolist(), 6, ())[0]
