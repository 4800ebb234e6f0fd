"""A real promotion on GSM8K: base, best trial, soups and WiSE-FT, with intervals and retention."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.commands import command, run_process

pytestmark = [pytest.mark.e2e, pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(3000)]

SPEECHES = 120


def test_merges_against_the_best_of_a_sweep(tmp_path: Path, shared_dir: Path) -> None:
    text = (shared_dir / "data/tinyshakespeare/input.txt").read_text()
    speeches = [speech for speech in text.split("\n\n") if len(speech) > 200][:SPEECHES]
    general = tmp_path / "general.jsonl"
    general.write_text("".join(json.dumps({"text": speech}) + "\n" for speech in speeches))
    rows = (shared_dir / "data/gsm8k/test.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "test.jsonl").write_text("".join(rows[:300]))
    done = run_process(
        command(
            "sweep",
            "jobs/gsm8k_lora.yaml",
            f"storage={tmp_path}",
            f"model.path={shared_dir}/models/stories260k",
            f"data.train.path={shared_dir}/data/gsm8k/train.jsonl",
            f"data.test.path={tmp_path}/test.jsonl",
            "data.validation=0.03",
            "train.epochs=null",
            "train.max_examples=800",
            "train.eval_every_examples=400",
            "train.precision=float32",
            "parallel.workers=1",
            "search.trials=4",
            "search.scheduler=null",
            "search.space.train.lr={log_uniform: [3e-3, 1e-2]}",
            "search.space.train.batch_size={choice: [8, 16]}",
            "promote.merge=auto",
            "promote.metrics=[loss, answer]",
            "promote.max_new_tokens=32",
            f"promote.retention={{path: {general}, format: text}}",
        ),
        2900,
    )
    print(done.stdout)
    assert done.returncode == 0, done.stderr
    promoted = tmp_path / "gsm8k-lora" / "promoted"
    measured = json.loads((promoted / "evaluation.json").read_text())
    assert (measured["split"], measured["examples"], measured["looks"]) == ("test", 300, 1)
    figures = {row["name"]: row["figures"] for row in measured["candidates"]}
    merges = {"wise_ft-0.2", "wise_ft-0.8", "uniform_soup", "greedy_soup", "task_arithmetic"}
    assert {"base", *merges} <= figures.keys()
    best = next(name for name in figures if name.startswith("trial-"))
    assert figures[best]["eval_loss"] < 0.5 * figures["base"]["eval_loss"]
    # The further from the base, the more was learned and the more was forgotten.
    curve = ["base", "wise_ft-0.2", "wise_ft-0.4", "wise_ft-0.6", "wise_ft-0.8", best]
    kl = [figures[name]["retention_kl"] for name in curve]
    assert kl == sorted(kl)
    assert kl[0] == pytest.approx(0, abs=1e-6)
    assert kl[-1] > 0.1
    # Greedy soup begins with the best trial, and adds only what improves it.
    assert figures["greedy_soup"]["eval_loss"] <= figures[best]["eval_loss"] + 1e-4
    low, high = measured["differences"]["eval_loss"]["interval"]
    assert low < high < -2
    assert measured["improved"]
    rows_of_scores = (promoted / "scores.jsonl").read_text().splitlines()
    assert sum('"split": "test"' in row for row in rows_of_scores) == 2 * 300
    assert (tmp_path / "gsm8k-lora" / "report.html").stat().st_size > 1_000_000
