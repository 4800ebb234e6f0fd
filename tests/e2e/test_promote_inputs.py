"""Wrong input of promotion: exit code 2, one line, nothing executed or overwritten."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from raytune_ft.cli import run_command
from tests.support.models import save_tiny_llama

ROOT = Path(__file__).parents[2]
QUICKSTART = str(ROOT / "jobs" / "quickstart.yaml")
ROWS = ROOT / "jobs" / "data" / "tiny_instructions" / "train.jsonl"
COLUMNS = "prompt: instruction, completion: response"

pytestmark = pytest.mark.e2e

# name: (overrides, words of the message)
CASES: dict[str, tuple[list[str], str]] = {
    "unknown metric": (
        ["promote.metrics=[loss, rogue]"],
        "promote.metrics=rogue is none of loss, answer, rouge, classification, reward, "
        "reward:NAME, win_rate:NAME, win_rate_lc:NAME, lm_eval:TASK or FILE.py:FUNCTION; did you "
        "mean rouge?",
    ),
    "a reward that is not there": (
        ["promote.metrics=[win_rate:gold]", "rewards=[exact_match]"],
        "promote.metrics=win_rate:gold names no reward; write one of exact_match",
    ),
    "metrics of rewards without rewards": (
        ["promote.metrics=[reward]"],
        "promote.metrics=reward needs a reward; write for example rewards: [exact_match]",
    ),
    "a file of rewards that is not there": (
        ["promote.metrics=[reward]", "rewards=['{tmp}/none.py:score']"],
        "names a file that cannot be read (No such file or directory); write FILE.py:FUNCTION",
    ),
    "a variable of a judge that is not set": (
        [
            "promote.metrics=['win_rate:judge']",
            "rewards=[{name: judge, url: 'http://h', model: m, api_key: '${NOT_SET_HERE}'}]",
        ],
        "rewards.judge.api_key names ${NOT_SET_HERE}, which is not set; write `export NOT_SET",
    ),
    "metric twice": (["promote.metrics=[loss, loss]"], "names one twice; write it once"),
    "figure of a metric that is not measured": (
        ["promote.metric=rougeL"],
        "promote.metric=rougeL is not a figure of promote.metrics=[loss]; add rouge to",
    ),
    "misspelt figure": (["promote.metric=eval_los"], "did you mean eval_loss?"),
    "bad pattern": (["promote.answer=(a"], "is not a regular expression"),
    "pattern with two groups": (["promote.answer=(a)(b)"], "has 2 groups"),
    "metric file that does not exist": (
        ["promote.metrics=[{tmp}/none.py:score]"],
        "names a file that cannot be read (No such file or directory); write FILE.py:FUNCTION",
    ),
    "metric file without that function": (
        ["promote.metrics=[{tmp}/own.py:score]"],
        "names no function of own.py, which has other; write one of them, or def it there",
    ),
    "metric file that is no Python": (
        ["promote.metrics=[{tmp}/broken.py:score]"],
        "names a file that cannot be read (it is not Python)",
    ),
    "test data that were trained on": (
        [f"data.test={{path: '{{tmp}}/leak.jsonl', {COLUMNS}}}"],
        "data.test shares 19 of its 50 prompts with data.train, more than promote.max_overlap=0.1 "
        "allows",
    ),
    "selecting on the test set": (
        [
            "data.validation={{path: {rows}, {columns}}}".format(
                rows="'{tmp}/test.jsonl'", columns=COLUMNS
            ),
            f"data.test={{path: '{{tmp}}/test.jsonl', {COLUMNS}}}",
        ],
        "is data.validation too, and selecting on the test set is refused",
    ),
    "a copy of the test set to select on": (
        [
            f"data.validation={{path: '{{tmp}}/copy.jsonl', {COLUMNS}}}",
            f"data.test={{path: '{{tmp}}/test.jsonl', {COLUMNS}}}",
        ],
        "data.test shares 30 of its 30 prompts with data.validation, more than "
        "promote.max_overlap=0.1 allows (selecting on the test set is refused)",
    ),
    "unknown tracker": (
        ["tracking.to=[tensorbord]"],
        "tracking.to=[tensorbord] is not a list of tensorboard, mlflow, wandb, trackio",
    ),
    "password of a tracker": (
        ["tracking.uri=http://me:hunter2@host:5000"],
        "tracking.uri holds a password",
    ),
}

Refused = Callable[..., str]


@pytest.fixture
def refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Refused:
    """The error line of a command that must fail."""
    monkeypatch.chdir(ROOT)
    (tmp_path / "own.py").write_text(
        f"open({str(tmp_path / 'ran')!r}, 'w')\ndef other(prompt, reference, generated): return 1\n"
    )
    (tmp_path / "broken.py").write_text("def score(:\n")
    rows = ROWS.read_text().splitlines(keepends=True)[:20]
    # Known prompts but for case and blanks, and other answers.
    known = [json.loads(row) | {"response": "x"} for row in rows]
    known = [row | {"instruction": "  " + row["instruction"].upper()} for row in known]
    new = [{"instruction": f"a new one, {n}", "response": "y"} for n in range(30)]
    for name, content in (("leak", known + new), ("test", new), ("copy", new)):
        text = "".join(json.dumps(row) + "\n" for row in content)
        (tmp_path / f"{name}.jsonl").write_text(text)

    def run(*arguments: str) -> str:
        filled = [argument.replace("{tmp}", str(tmp_path)) for argument in arguments]
        code = run_command([*filled, f"storage={tmp_path}/runs"])
        errors = capsys.readouterr().err
        assert (code, errors.count("\n")) == (2, 1), errors
        assert "hunter2" not in errors
        assert not (tmp_path / "ran").exists()
        return errors

    return run


@pytest.mark.parametrize("case", CASES)
def test_bad_value(refused: Refused, case: str, tmp_path: Path) -> None:
    overrides, message = CASES[case]
    assert message in refused("train", QUICKSTART, "name=bad", *overrides)
    assert not (tmp_path / "runs" / "bad").exists()


def test_a_model_directory_that_would_execute_code(refused: Refused, tmp_path: Path) -> None:
    model = save_tiny_llama(tmp_path / "model")
    settings = json.loads((model / "config.json").read_text())
    settings |= {
        "model_type": "own",
        "auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"},
    }
    (model / "config.json").write_text(json.dumps(settings))
    (model / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    message = refused("evaluate", str(model), "--config", QUICKSTART)
    assert "model.path" in message
    assert message.startswith("error: ")


def test_a_pickle_is_not_loaded(refused: Refused, tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str, str]]:
            return open, (str(tmp_path / "ran"), "w")

    model = save_tiny_llama(tmp_path / "model")
    (model / "model.safetensors").unlink()
    torch.save({"weight": Evil()}, model / "pytorch_model.bin")
    message = refused("evaluate", str(model), "--config", QUICKSTART)
    assert "safetensors" in message


def test_a_task_that_the_harness_does_not_know(refused: Refused, tmp_path: Path) -> None:
    model = save_tiny_llama(tmp_path / "model")
    message = refused(
        "evaluate", str(model), "--config", QUICKSTART, "promote.metrics=[lm_eval:{tmp}/none.yaml]"
    )
    assert "names a file that does not exist" in message
