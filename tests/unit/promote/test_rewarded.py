"""Promotion by rewards: sampled answers, scores, win rates, and what they cost."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from raytune_ft import app
from raytune_ft.config.load import apply_overrides, dump_yaml, load_config
from raytune_ft.config.schema import Config
from raytune_ft.errors import ConfigError
from raytune_ft.promote.promote import promote
from raytune_ft.report.write import write_report
from tests.support.judge import KEY, Server, serving
from tests.support.trained import TEST, Train, config_of

OWN = """
import os, pathlib
with (pathlib.Path(__file__).parent / "starts").open("a") as file:
    file.write(f"{os.getpid()}\\n")

def letters(prompt, reference, generated):
    return None if prompt.endswith("h") else float(generated.count(prompt[-1]))
"""
METRICS = ["reward", "win_rate:letters", "win_rate_lc:letters", "win_rate:length"]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def changed(run: Path, **changes: Any) -> Config:
    """The run with another config.yaml."""
    dotted = {key.replace("__", "."): value for key, value in changes.items()}
    config = apply_overrides(config_of(run), dotted)
    (run / "config.yaml").write_text(dump_yaml(config))
    return config


@pytest.fixture
def own(tmp_path: Path) -> Path:
    (tmp_path / "own.py").write_text(OWN)
    return tmp_path / "own.py"


def test_rewards_decide_and_are_those_of_sample(
    run_dir: Path, own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed(
        run_dir,
        rewards=[f"{own}:letters", {"name": "length", "target": 4, "weight": 0.5}],
        promote__metrics=METRICS,
        promote__metric="reward",
        promote__completions=2,
        sampling__max_new_tokens=6,
    )
    with pytest.raises(ConfigError, match=r"rewards=.*own.py:letters is Python code that"):
        promote(run_dir)
    said: list[str] = []
    made = promote(run_dir, code=None, tell=said.append)
    evaluation = made.evaluation
    assert evaluation.metric == "reward"
    assert evaluation.winner == "trained"
    assert evaluation.improved
    assert evaluation.base["win_rate:letters"] == 0.5
    assert evaluation.base["win_rate_lc:letters"] == 0.5
    assert evaluation.promoted["win_rate:letters"] > 0.6
    assert set(evaluation.promoted) >= {
        *("reward", "reward:letters", "reward:length", "completion_tokens", "truncated"),
        *("unscored", *METRICS),
    }
    # One process for the base and the candidate, on validation and on test.
    assert len((own.parent / "starts").read_text().splitlines()) == 1

    test = [one for one in lines(made.path / "scores.jsonl") if one["split"] == "test"]
    by_name = {
        name: [one for one in test if one["candidate"] == name] for name in ("base", "trained")
    }
    assert [len(each) for each in by_name.values()] == [TEST, TEST]
    missing = [one["reward:letters"] is None for one in by_name["trained"]]
    assert 0 < sum(missing) < TEST
    assert evaluation.promoted["unscored"] == pytest.approx(sum(missing) / TEST)
    assert any("letters: no score for None" in line for line in said)

    # Of the same prompts, seed and settings, `raytune-ft sample` writes the same completions.
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "samples.jsonl"
    files = (out, None, None, None)
    app.sample(
        str(made.model), run_dir / "config.yaml", ["sampling.n=2"], *files, "test", said.append
    )
    for place, one in enumerate(by_name["trained"]):
        own_rows = [row for row in lines(out) if row["place"] == place]
        for name in ("letters", "length"):
            scores = [row["scores"][name] for row in own_rows if row["scores"][name] is not None]
            expected = sum(scores) / len(scores) if scores else None
            assert one[f"reward:{name}"] == pytest.approx(expected, abs=1e-6)
        assert one["answers"] == [row["completion"] for row in own_rows]
        tokens = [len(row["completion_ids"]) for row in own_rows]
        assert one["completion_tokens"] == sum(tokens) / 2
        assert one["truncated"] == sum(not row["ended"] for row in own_rows) / 2

    # The report and the card show win rates and rewards.
    page = write_report(run_dir).read_text()
    card = (made.path / "README.md").read_text()
    for name in ("win_rate:letters", "reward", "truncated"):
        assert name in card
        assert name.replace("_", " ") in page

    # `evaluate` gives the same figures, with the base beside them.
    found = app.evaluate(str(made.model), run_dir / "config.yaml", [], said.append)
    for name in ("reward", "truncated", *METRICS):
        assert found[name] == pytest.approx(evaluation.promoted[name], abs=1e-6)
    base = config_of(run_dir).model.path
    found = app.evaluate(base, run_dir / "config.yaml", [], said.append)
    assert found["win_rate:letters"] == found["win_rate_lc:letters"] == 0.5
    assert found["reward"] == pytest.approx(evaluation.base["reward"], abs=1e-6)


@pytest.fixture
def server() -> Any:
    with serving() as made:
        yield made


def test_a_judge_compares_with_the_base_in_both_orders(
    run_dir: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    judge = {"name": "judge", "label": "gold", "url": server.url, "model": "m", "mode": "pairs"}
    changed(
        run_dir,
        rewards=[{**judge, "api_key": "${JUDGE_KEY}"}],
        promote__metrics=["win_rate:gold", "win_rate_lc:gold"],
        promote__metric="win_rate:gold",
        promote__merge="auto",
        sampling__max_new_tokens=6,
        sampling__temperature=0.0,
    )
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    with pytest.raises(ConfigError, match=r"rewards\.gold\.api_key names \$\{JUDGE_KEY\}"):
        promote(run_dir, code=None)
    monkeypatch.setenv("JUDGE_KEY", KEY)
    with pytest.raises(ConfigError, match=r"\$\{JUDGE_KEY\} is a secret that .* names"):
        promote(run_dir)
    assert not server.questions
    evaluation = promote(run_dir, code=None).evaluation
    figures = evaluation.promoted
    assert 0 <= figures["win_rate:gold"] <= 1
    # It says A to answers of one length in both orders: a tie, and counted.
    assert 0 <= figures["disagreed:gold"] < 1
    assert evaluation.base["win_rate:gold"] == 0.5
    assert len(server.questions) == len(set(server.questions)) > 0
    written = [file for file in run_dir.parent.rglob("*") if file.is_file()]
    assert any(file.parent.name == "judges" for file in written)
    assert not any(KEY.encode() in file.read_bytes() for file in written)


def test_a_reward_model_measures_a_promotion(
    train: Train, run_dir: Path, inputs: Path, tmp_path: Path
) -> None:
    pairs = [
        {"prompt": f"say {letter}", "chosen": letter * 2, "rejected": "zq"} for letter in "abcdefgh"
    ]
    text = "".join(json.dumps(row) + "\n" for row in pairs * 8)
    (tmp_path / "pairs.jsonl").write_text(text)
    source = f"{{path: {tmp_path}/pairs.jsonl, format: preference}}"
    own = [f"data.train={source}", f"data.test={source}", "train.objective=reward"]
    rm = promote(train("rm_of_letters", *own)).model
    changed(
        run_dir,
        rewards=[{"name": "model", "label": "rm", "path": str(rm)}],
        promote__metrics=["reward:rm", "win_rate:rm"],
        promote__metric="win_rate:rm",
        sampling__max_new_tokens=6,
    )
    evaluation = promote(run_dir).evaluation
    assert evaluation.promoted["win_rate:rm"] > 0.5
    assert evaluation.differences["win_rate:rm"]["difference"] == pytest.approx(
        evaluation.promoted["win_rate:rm"] - 0.5
    )
    assert math.isfinite(evaluation.promoted["reward:rm"])
    assert "reward" not in evaluation.promoted


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "promote.metrics=reward needs a reward; write for example rewards: [exact_match]"),
        (
            {"rewards": ["exact_match"], "promote.metrics": ["win_rate:exactmatch"]},
            "promote.metrics=win_rate:exactmatch names no reward; did you mean exact_match?",
        ),
        (
            {"rewards": ["exact_match", "gsm8k"], "promote.metrics": ["win_rate_lc:x"]},
            "promote.metrics=win_rate_lc:x names no reward; write one of exact_match, gsm8k",
        ),
        (
            {"rewards": [{"name": "judge", "url": "http://h", "model": "m", "mode": "pairs"}]},
            "promote.metrics=reward is the reward of a judge that compares completions and "
            "grades none by itself; write win_rate:judge, or mode: grade",
        ),
        (
            {"rewards": ["exact_match"], "promote.metric": "win_rate:exact_match"},
            "promote.metric=win_rate:exact_match is not a figure of promote.metrics=[reward]; "
            "add win_rate:exact_match to promote.metrics",
        ),
        (
            {
                "rewards": ["exact_match"],
                "promote.metrics": ["win_rate:exact_match"],
                "promote.metric": "win_rate:exact_match",
                "promote.merge": "greedy_soup",
            },
            "promote.metric=win_rate:exact_match compares two models, and "
            "promote.merge=greedy_soup chooses members by a figure of one; write reward",
        ),
        (
            {"rewards": ["exact_match"], "promote.completions": 2, "sampling.temperature": 0.0},
            "promote.completions=2 are the same completion under sampling.temperature=0; write 1",
        ),
        (
            {"rewards": ["exact_match"], "data.train": {"path": "a.txt", "format": "text"}},
            "promote.metrics=reward lets the model answer prompts, and data.train.format=text has "
            "none; leave it out",
        ),
        (
            {"rewards": ["exact_match"], "promote.metrics": ["rewards"]},
            "promote.metrics=rewards is none of loss, answer, rouge, classification, reward, "
            "reward:NAME, win_rate:NAME, win_rate_lc:NAME, lm_eval:TASK or FILE.py:FUNCTION; did "
            "you mean reward?",
        ),
    ],
)
def test_what_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(
        "name: x\ndata: {train: {path: a.jsonl}}\npromote: {metrics: [loss]}\n"
    )
    config = load_config(tmp_path / "c.yaml")
    with pytest.raises(ConfigError) as raised:
        apply_overrides(config, {"promote.metrics": ["reward"], **changes})
    assert message in str(raised.value)
