"""`raytune-ft sample` as a user runs it: samples, scores, preferences, resumes and refusals."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from raytune_ft.cli import run_command
from raytune_ft.config.load import load_config
from raytune_ft.model.load import resolve_model_path

pytestmark = pytest.mark.e2e

CONFIG = """\
name: said
storage: {folder}/runs
data:
  train: {{path: {folder}/rows.jsonl}}
  validation: 0.4
  test: {{path: {folder}/rows.jsonl}}
promote: {{max_overlap: 1}}
sampling: {{n: 3, max_new_tokens: 6}}
rewards: [{folder}/own.py:letters, {{name: length, target: 6, weight: 0.5}}]
"""
OWN = """\
import time
def letters(prompt, reference, generated):
    return generated.count("e")
def trl(prompts, completions, topic, **kwargs):
    return [None if t == "x" else float(len(c)) for t, c in zip(topic, completions)]
def slow(prompt, reference, generated):
    time.sleep(0.1)
    return generated.count("e")
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    rows = [{"prompt": f"Say {i}.", "completion": "one", "topic": "xy"[i % 2]} for i in range(5)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("own.py").write_text(OWN)
    Path("c.yaml").write_text(CONFIG.format(folder=tmp_path))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield tmp_path
    torch.set_num_threads(threads)


def sampled(*arguments: str) -> int:
    return run_command(["sample", "builtin:tiny", "--config", "c.yaml", *arguments])


def rows_of(name: str = "samples.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(name).read_text().splitlines()]


def test_samples_and_preferences(capsys: pytest.CaptureFixture[str]) -> None:
    assert sampled("--pairs", "pairs.jsonl") == 0
    rows = rows_of()
    assert [(row["place"], row["sample"]) for row in rows] == [
        (place, number) for place in range(5) for number in range(3)
    ]
    for row in rows:
        assert row["prompt"] == f"Say {row['place']}."
        assert row["scores"]["letters"] == row["completion"].count("e")
        assert row["score"] == row["scores"]["letters"] + 0.5 * row["scores"]["length"]
        assert len(row["completion_ids"]) == 6 or row["ended"]
    expected = []
    for place in range(5):
        own = [row for row in rows if row["place"] == place]
        best = max(own, key=lambda row: row["score"])
        worst = min(own, key=lambda row: row["score"])
        if best["score"] > worst["score"]:
            expected.append((f"Say {place}.", best["completion"], worst["completion"]))
    pairs = rows_of("pairs.jsonl")
    assert [(one["prompt"], one["chosen"], one["rejected"]) for one in pairs] == expected
    assert all(set(one) == {"prompt", "chosen", "rejected", "margin"} for one in pairs)
    said = capsys.readouterr().out
    assert re.search(rf"^pairs +{len(pairs)} *$", said, re.M)
    # Preferences of samples that are there cost no sampling, and need no reward.
    before = Path("samples.jsonl").read_bytes()
    assert sampled("--pairs", "again.jsonl") == 0
    assert Path("again.jsonl").read_bytes() == Path("pairs.jsonl").read_bytes()
    assert Path("samples.jsonl").read_bytes() == before
    assert re.search(r"of an earlier command +15", capsys.readouterr().out)


def test_the_mean_of_the_best_of_n_is_the_closed_form(capsys: pytest.CaptureFixture[str]) -> None:
    """Of a reward of 0 or 1 that one completion has with probability p: 1 - (1 - p)^n."""
    path = resolve_model_path("builtin:tiny")
    model, tokenizer = (one.from_pretrained(path) for one in (AutoModelForCausalLM, AutoTokenizer))
    rows = [{"prompt": "Say 1.", "completion": "one"}] * 600
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    ids = tokenizer("Say 1.\n", return_tensors="pt")
    with torch.no_grad():
        shares = model(**ids).logits[0, -1].double().softmax(-1)
    words = [tokenizer.decode([token], skip_special_tokens=True) for token in range(len(shares))]
    by_letter = {
        letter: float(shares[torch.tensor([letter in word for word in words])].sum())
        for letter in "abcdefghijklmnopqrstuvwxyz"
    }
    letter, p = min(by_letter.items(), key=lambda pair: abs(pair[1] - 0.25))
    assert 0.1 < p < 0.5
    reward = f"rewards=[{{name: regex, pattern: {letter}}}]"
    one_token = ["sampling.max_new_tokens=1", reward, "--split", "test"]
    for n in (2, 4):
        out = ["--n", str(n), "--out", f"s{n}.jsonl", "--best", f"best{n}.jsonl"]
        assert sampled(*one_token, *out) == 0
        best = rows_of(f"best{n}.jsonl")
        expected = 1 - (1 - p) ** n
        spread = (expected * (1 - expected) / len(best)) ** 0.5
        mean = sum(row["score"] for row in best) / len(best)
        assert len(best) == 600
        assert abs(mean - expected) < 4 * spread
        shown = re.search(r"mean of the best +([\d.]+)", capsys.readouterr().out)
        assert shown is not None
        assert float(shown[1]) == pytest.approx(mean, rel=1e-3)
        for row in best:
            assert (letter in row["completion"]) == (row["score"] == 1)


def test_the_best_are_rows_to_train_on(capsys: pytest.CaptureFixture[str]) -> None:
    assert sampled("--best", "best.jsonl") == 0
    rows, best = rows_of(), rows_of("best.jsonl")
    assert len(best) == 5
    for place, one in enumerate(best):
        own = [row for row in rows if row["place"] == place]
        first = max(own, key=lambda row: row["score"])
        assert one == {key: first[key] for key in ("prompt", "completion", "score")}
    # Of samples that are there it costs no sampling.
    assert sampled("--best", "again.jsonl", "--pairs", "pairs.jsonl") == 0
    assert Path("again.jsonl").read_bytes() == Path("best.jsonl").read_bytes()
    assert "of an earlier command" in capsys.readouterr().out
    chats = [
        {
            "messages": [
                {"role": "user", "content": f"Say {i}."},
                {"role": "assistant", "content": "a"},
            ]
        }
        for i in range(4)
    ]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chats))
    chat = "{path: rows.jsonl, format: messages, chat_template: chatml}"
    sources = [f"data.train={chat}", f"data.test={chat}"]
    assert sampled(*sources, "--out", "chats.jsonl", "--best", "chat_best.jsonl") == 0
    for place, one in enumerate(rows_of("chat_best.jsonl")):
        assert one["prompt"] == [{"role": "user", "content": f"Say {place}."}]
        assert [turn["role"] for turn in one["completion"]] == ["assistant"]
    learn = ["train", "c.yaml", "name=best", "train.max_examples=4", "data.test=null"]
    assert run_command([*learn, "data.train={path: best.jsonl}"]) == 0
    learn[2] = "name=chat"
    source = "data.train={path: chat_best.jsonl, chat_template: chatml}"
    assert run_command([*learn, source]) == 0


def test_a_cut_file_is_completed(monkeypatch: pytest.MonkeyPatch) -> None:
    from raytune_ft.evaluate import sample

    monkeypatch.setattr(sample, "CHUNK_ROWS", 3)  # a prompt at a time
    assert sampled() == 0
    whole = Path("samples.jsonl").read_bytes()
    lines = whole.splitlines(keepends=True)
    for left in (b"", b"".join(lines[:7]), b"".join(lines[:9]) + lines[9][:20]):
        Path("samples.jsonl").write_bytes(left)
        assert sampled() == 0
        assert Path("samples.jsonl").read_bytes() == whole


def test_it_goes_on_after_a_kill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from raytune_ft.evaluate import sample

    rewards = f"rewards=[{tmp_path}/own.py:slow]"
    # Each prompt is written for itself, so that the kill finds a part of the file.
    program = (
        "import sys; from raytune_ft.cli import run_command\n"
        "from raytune_ft.evaluate import sample; sample.CHUNK_ROWS = 3\n"
        "run_command(sys.argv[1:])"
    )
    begun = ["sample", "builtin:tiny", "--config", "c.yaml", rewards]
    driver = subprocess.Popen([sys.executable, "-c", program, *begun])
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if Path("samples.jsonl").exists() and Path("samples.jsonl").stat().st_size:
            break
        time.sleep(0.02)
    driver.kill()
    driver.wait()
    assert 3 <= len(rows_of()) < 15
    monkeypatch.setattr(sample, "CHUNK_ROWS", 3)
    assert sampled(rewards) == 0
    assert sampled(rewards, "--out", "whole.jsonl") == 0
    assert Path("samples.jsonl").read_bytes() == Path("whole.jsonl").read_bytes()


@pytest.mark.slow
def test_an_interrupt_ends_at_once_with_130(tmp_path: Path) -> None:
    Path("own.py").write_text(
        "import pathlib, time\n"
        "def hang(prompt, reference, generated):\n"
        f"    pathlib.Path({str(tmp_path / 'begun')!r}).touch()\n"
        "    time.sleep(60)\n"
    )
    rewards = f"rewards=[{{name: '{tmp_path}/own.py:hang', timeout_s: 55}}]"
    command = [sys.executable, "-m", "raytune_ft", "sample", "builtin:tiny"]
    driver = subprocess.Popen([*command, "--config", "c.yaml", rewards])
    deadline = time.monotonic() + 120
    while not Path("begun").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    start = time.monotonic()
    driver.send_signal(signal.SIGINT)
    assert driver.wait(30) == 130
    assert time.monotonic() - start < 15


def test_trl_functions_and_missing_scores(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rewards = f"rewards=['{tmp_path}/own.py:trl']"
    assert sampled(rewards, "--pairs", "pairs.jsonl") == 0
    said = capsys.readouterr().out
    assert re.search(r"without trl +9", said)
    assert re.search(r"prompts without scores +3", said)
    assert {row["scores"]["trl"] for row in rows_of() if row["place"] % 2 == 0} == {None}


def test_a_reward_that_always_fails_ends_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Path("own.py").open("a") as file:
        file.write("def broken(prompt, reference, generated):\n    return 1 / 0\n")
        file.write("def none(prompt, reference, generated):\n    return None\n")
    assert sampled(f"rewards=['{tmp_path}/own.py:broken']") == 1
    error = capsys.readouterr().err
    assert "broken scored none of 15 completions; the first: rows.jsonl:1: ZeroDivision" in error
    assert error.count("\n") == 1
    assert rows_of() == []
    assert sampled(f"rewards=['{tmp_path}/own.py:none']") == 0
    assert len(rows_of()) == 15


def test_prompts_of_a_file_and_greedy(capsys: pytest.CaptureFixture[str]) -> None:
    Path("asked.jsonl").write_text('{"prompt": "Say 3."}\n{"prompt": "Say 1."}\n')
    greedy = ["sampling.temperature=0", "--n", "1", "rewards=[]"]
    assert sampled("--prompts", "asked.jsonl", "--out", "a.jsonl", *greedy) == 0
    assert sampled("--out", "b.jsonl", *greedy) == 0
    found, known = rows_of("a.jsonl"), rows_of("b.jsonl")
    assert [row["completion_ids"] for row in found] == [
        known[3]["completion_ids"],
        known[1]["completion_ids"],
    ]
    assert found[0]["score"] is None


def test_validation(capsys: pytest.CaptureFixture[str]) -> None:
    assert sampled("--split", "validation") == 0
    assert len(rows_of()) == 2 * 3


BAD: list[tuple[list[str], str]] = [
    (["rewards=[exact_mach]"], "rewards=exact_mach is none of"),
    (["rewards=[exact_match, exact_match]"], "rewards=exact_match is called exact_match in"),
    (["rewards=[own.py:lettres]"], "names no function of own.py, which has letters, trl, slow"),
    (["rewards=[{name: length}]"], "rewards.length needs one of target and limit"),
    (["rewards=[{name: length, traget: 5}]"], "rewards.length.traget is not a key; did you mean"),
    (["rewards=[{name: length, target: -1}]"], "rewards.length.target=-1 is not"),
    (["rewards=[{name: regex, pattern: '('}]"], "rewards.regex.pattern=( is not a regular"),
    (["rewards=[code]"], "rewards.code takes 'tests', which is no column of data.test (prompt, c"),
    (["rewards=[{name: judge, url: 'http://127.0.0.1:9', model: m}]"], "that does not answer"),
    (
        ["rewards=[{name: judge, url: 'http://h', model: m, api_key: secret-key}]"],
        "rewards.judge.api_key is a secret, and the config is saved in the clear",
    ),
    (["rewards=[]", "--pairs", "p.jsonl"], "--pairs p.jsonl needs scores"),
    (["rewards=[]", "--best", "b.jsonl"], "--best b.jsonl needs scores; write rewards: [...]"),
    (["--n", "1", "--best", "b.jsonl"], "--best b.jsonl needs two completions of a prompt; write"),
    (["--best", "samples.jsonl"], "--best samples.jsonl is --out too; write another file"),
    (["--pairs", "p.jsonl", "--best", "p.jsonl"], "--best p.jsonl is --pairs too"),
    (["rewards=[{name: model, path: ./nowhere}]"], "nowhere does not exist; write an existing"),
    (
        ["rewards=[{name: model, label: rm, path: 'builtin:tiny'}]"],
        "rewards.rm.path=builtin:tiny has no head for whole answers, and so gives no reward; train "
        "one with train.objective: reward",
    ),
    (["rewards=[{name: model}]"], "rewards.model.path is missing; write text"),
    (["rewards=[{name: exact_match, label: 'a:b'}]"], "rewards.exact_match.label=a:b is not"),
    (["--n", "1", "--pairs", "p.jsonl"], "--pairs p.jsonl needs two completions of a prompt"),
    (["sampling.temperature=0"], "sampling.temperature=0 gives 3 times the same completion"),
    (["sampling.temperature=-1"], "sampling.temperature=-1 is not a number of at least 0"),
    (["sampling.max_new_tokens=5000"], "sampling.max_new_tokens=5000 after prompts of up to"),
    (["--out", "nowhere/s.jsonl"], "--out nowhere/s.jsonl is in no directory that exists"),
    (["--out", "p.jsonl", "--pairs", "p.jsonl"], "--pairs p.jsonl is --out too"),
    (["--prompts", "none.jsonl"], "--prompts none.jsonl is no file"),
    (["--prompts", "rows.jsonl", "--out", "rows.jsonl"], "--out rows.jsonl is the file of --prom"),
    (["train.objective=classification", "data.train.format=classification"], "error: "),
    (["data.test=null", "--split", "test"], "--split test has no rows"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=lambda value: str(value)[:50])
def test_bad_inputs_are_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sampled(*arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert "secret-key" not in error
    assert not Path("samples.jsonl").exists() or not Path("samples.jsonl").stat().st_size


def test_samples_of_other_settings_are_not_mixed(capsys: pytest.CaptureFixture[str]) -> None:
    assert sampled("--out", "s.jsonl") == 0
    before = Path("s.jsonl").read_bytes()
    for change, key in (
        ("sampling.top_p=0.5", "sampling"),
        ("seed=1", "seed"),
        ("rewards=[exact_match]", "rewards"),
    ):
        assert sampled("--out", "s.jsonl", change) == 2
        assert f"holds samples of other settings ({key} in" in capsys.readouterr().err
    Path("own.py").write_text(OWN + "\n")
    assert sampled("--out", "s.jsonl") == 2
    assert "(rewards in" in capsys.readouterr().err
    Path("own.py").write_text(OWN)
    Path("foreign.jsonl").write_text('{"a": 1}\n')
    assert sampled("--out", "foreign.jsonl") == 2
    assert "exists, and no foreign.jsonl.settings.json says what it holds" in (
        capsys.readouterr().err
    )
    assert Path("foreign.jsonl").read_text() == '{"a": 1}\n'
    assert Path("s.jsonl").read_bytes() == before


def test_a_cluster_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert sampled() == 2
    assert "RAY_ADDRESS=10.0.0.1:6379 names a cluster" in capsys.readouterr().err


def test_rewards_change_no_run(tmp_path: Path) -> None:
    from raytune_ft.config.identity import check_resume, config_sha256

    config = load_config(Path("c.yaml"))
    other = load_config(Path("c.yaml"), ["rewards=[]", "sampling.n=1"])
    assert config_sha256(config) == config_sha256(other)
    check_resume(config, other)
