"""What the config of a run on preferences becomes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from raytune_ft.config.execution import choose_execution
from raytune_ft.config.load import load_config
from raytune_ft.config.resolve import resolve

ROOT = Path(__file__).parents[3]


def written(tmp_path: Path, *overrides: str, drop: tuple[str, ...]) -> Any:
    """`jobs/dpo.yaml` without the lines that begin with these keys."""
    lines = (ROOT / "jobs" / "dpo.yaml").read_text().splitlines()
    kept = [line for line in lines if not line.strip().startswith(tuple(f"{k}:" for k in drop))]
    file = tmp_path / "dpo.yaml"
    file.write_text("\n".join(kept) + "\n")
    return load_config(file, [f"storage={tmp_path}", *overrides])


@pytest.mark.parametrize(
    ("objective", "method", "lr"),
    [
        ("dpo", "lora", 2e-5),
        ("dpo", "full", 1e-6),
        ("orpo", "lora", 8e-5),
        ("simpo", "full", 1e-6),
        ("reward", "lora", 1e-4),
    ],
)
def test_a_learning_rate_that_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, objective: str, method: str, lr: float
) -> None:
    monkeypatch.chdir(ROOT)
    changes = ["search=null", f"train.objective={objective}", f"method={{name: {method}}}"]
    config = written(tmp_path, *changes, drop=("lr", "dpo", "train.lr", "train.dpo"))
    assert (config.train.lr, config.data.too_long) == (lr, "drop")
    assert resolve(config).train.lr == lr
    own = ["train.lr=3e-4", "data.too_long=truncate"]
    kept = written(tmp_path, *changes[:2], *own, drop=("dpo", "train.dpo"))
    assert (kept.train.lr, kept.data.too_long) == (3e-4, "truncate")


def test_trials_of_several_objectives_share_a_base(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    beta = "search.space.train.dpo.beta.when={train.objective: [dpo]}"
    choice = "search.space.train.objective.choice=[dpo, orpo, simpo]"
    config = written(tmp_path, choice, beta, drop=("dpo",))
    assert choose_execution(config)[0] == "packed"
    assert resolve(config).train.lr == 1e-3
    headed = "search.space.train.objective.choice=[dpo, reward]"
    assert choose_execution(written(tmp_path, headed, beta, drop=("dpo",)))[0] == "isolated"


def test_the_defaults_are_told(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    source = "{path: pairs.jsonl, format: preference}"
    file.write_text(
        f"name: a\nmodel: {{path: x}}\nmethod: {{name: lora}}\ndata: {{train: {source}}}\n"
    )
    lines: list[str] = []
    load_config(file, ["train.objective=dpo"], lines.append)
    (line,) = lines
    assert line.startswith("train.lr=2e-05 and data.too_long=drop: not written")
    assert load_config(file, ["train.objective=sft", "data.train.format=text"]).train.lr == 2e-4
