"""Every class that transformers has for causal language models: it works, or `plan` refuses it.

`make test` runs a selection; `make test-families` runs all and writes the table of docs/models.md.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from raytune_ft.config.schema import ModelConfig
from raytune_ft.errors import ModelError
from raytune_ft.model.load import UNSUPPORTED, load_model_config
from tests.support.families import CLASSES, HEADER, save_without_weights, try_family
from tests.support.runs import write_rows

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
SELECTED = {
    "bamba": "lora",
    "falcon_h1": "full",
    "gemma3_text": "lora",
    "gpt_neox": "full",
    "inkling_text": "lora",
    "lfm2": "lora",
    "mamba2": "full",
    "mixtral": "lora",
    "olmo_hybrid": "full",
    "qwen3_5_text": "lora",
    "qwen3_next": "full",
}
ENCODER = '"is_decoder": true'

pytestmark = [
    pytest.mark.usefixtures("traced_once"),
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


def table() -> dict[str, str]:
    """The lines of docs/models.md by their families."""
    lines = PAGE.read_text(encoding="utf-8").splitlines(keepends=True)
    found = [(re.match(r"\| `([^`]+)` \|", line), line) for line in lines]
    return {match[1]: line for match, line in found if match}


@pytest.mark.parametrize("family", SELECTED)
def test_a_family_works(tmp_path: Path, family: str) -> None:
    write_rows(tmp_path / "rows.jsonl", 12)
    outcome = try_family(family, tmp_path, [SELECTED[family]])
    assert outcome.methods == (SELECTED[family],), outcome.reason
    written = table()[family].split(" | ")
    assert [written[4], written[6].rstrip(" |\n")] == [
        "yes" if outcome.packs else "no",
        outcome.reason,
    ]


def test_the_table_names_every_family() -> None:
    assert list(table()) == sorted(CLASSES)
    for family, reason in UNSUPPORTED.items():
        assert table()[family].endswith(f"| refused | refused | - | - | {reason} |\n")


@pytest.mark.parametrize(
    ("family", "remedy"),
    [
        *((family, "docs/models.md") for family in UNSUPPORTED),
        ("bert", ENCODER),
        ("bert-generation", ENCODER),
        ("roberta", ENCODER),
        ("xlm", '"causal": true'),
        ("t5", "decoder"),
    ],
)
def test_what_cannot_be_trained_is_refused(tmp_path: Path, family: str, remedy: str) -> None:
    model = ModelConfig(path=str(save_without_weights(family, tmp_path / "model")))
    with pytest.raises(ModelError) as refusal:
        load_model_config(model)
    assert refusal.value.rule.startswith(f"is a {family} model, ")
    assert remedy in refusal.value.remedy


@pytest.fixture(scope="module")
def tried() -> Iterator[dict[str, str]]:
    """Lines of the table; RAYTUNE_FT_WRITE=1 puts them into the page, beside those of others."""
    lines: dict[str, str] = {}
    yield lines
    if os.environ.get("RAYTUNE_FT_WRITE"):
        all_lines = table() | lines
        text = HEADER + "".join(all_lines[family] for family in sorted(all_lines))
        page = re.sub(
            r"(<!-- families -->\n).*?(<!-- /families -->)",
            lambda found: found[1] + text + found[2],
            PAGE.read_text(encoding="utf-8"),
            flags=re.S,
        )
        PAGE.write_text(page, encoding="utf-8")


@pytest.mark.families
@pytest.mark.parametrize("family", sorted(CLASSES))
def test_all_families(tmp_path: Path, tried: dict[str, str], family: str) -> None:
    write_rows(tmp_path / "rows.jsonl", 12)
    tried[family] = try_family(family, tmp_path).line
    print(tried[family])
