"""Data files of other tools train as they are published, without a conversion.

The rows here have the keys, the nesting and the types of three published files, in words of our
own: LLaMA-Factory's alpaca_en_demo.json and glaive_toolcall_en_demo.json, and drone_training.jsonl
of OpenAI's cookbook. RAYTUNE_FT_PEER_FILES names a directory with the files themselves; those that
it has are trained too.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from raytune_ft.cli import run_command
from tests.support.templates import save_base_with_marks, vendor_template

pytestmark = [pytest.mark.e2e, pytest.mark.usefixtures("traced_once")]

Rows = list[dict[str, Any]]
PLACES = ["Lyon", "Oslo", "Porto", "Riga", "Turin", "Bergen", "Graz", "Delft", "Cork", "Vaasa"]
PARAMETERS = {
    "type": "object",
    "properties": {"place": {"type": "string", "description": "Name of a town"}},
    "required": ["place"],
}
CONFIG = """\
name: peer
model: {{path: base}}
method: {{name: lora, rank: 2}}
data:
  train: {{path: {path}, format: auto, chat_template: template.jinja}}
  validation: 0.2
  max_length: {max_length}
train: {{max_examples: 16, batch_size: 8, precision: float32}}
"""


def alpaca() -> Rows:
    """A list of objects; `input` is blank in some."""
    return [
        {
            "instruction": "Name the country of a town." if n % 2 else f"Where is {place}?",
            "input": place if n % 2 else "",
            "output": f"{place} lies in Europe.",
        }
        for n, place in enumerate(PLACES)
    ]


def glaive() -> Rows:
    """ShareGPT with calls and results as JSON text, and `tools` as JSON text without `type`."""
    tool = {"name": "weather", "description": "Weather of a town", "parameters": PARAMETERS}
    return [
        {
            "conversations": [
                {"from": "human", "value": f"How is the weather in {place}?"},
                {
                    "from": "function_call",
                    "value": _json(name="weather", arguments={"place": place}),
                },
                {"from": "observation", "value": _json(weather="dry")},
                {"from": "gpt", "value": f"It is dry in {place}."},
            ],
            "tools": json.dumps([tool]),
        }
        for place in PLACES
    ]


def drone() -> Rows:
    """OpenAI's form: arguments as JSON text, no `content` beside a call, an option of the API."""
    function = {"name": "fly_to", "description": "Flies to a town", "parameters": PARAMETERS}
    return [
        {
            "messages": [
                {"role": "system", "content": "You fly a drone."},
                {"role": "user", "content": f"Go to {place}"},
                {
                    "role": "assistant",
                    "tool_calls": [
                        {
                            "id": "call_id",
                            "type": "function",
                            "function": {"name": "fly_to", "arguments": _json(place=place)},
                        }
                    ],
                },
            ],
            "parallel_tool_calls": False,
            "tools": [{"type": "function", "function": function}],
        }
        for place in PLACES
    ]


def _json(**values: Any) -> str:
    return json.dumps(values)


FILES: dict[str, tuple[Callable[[], Rows], str, str | None]] = {
    "alpaca_en_demo.json": (alpaca, "alpaca", None),
    "glaive_toolcall_en_demo.json": (glaive, "sharegpt", None),
    "drone_training.jsonl": (drone, "messages", "not read: parallel_tool_calls (10 of 10 rows)"),
}


@pytest.mark.parametrize("name", FILES)
def test_rows_of_the_published_shape(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, form, unread = FILES[name]
    content = rows()
    text = json.dumps(content, indent=2)
    if name.endswith(".jsonl"):
        text = "".join(json.dumps(row) + "\n" for row in content)
    (tmp_path / name).write_text(text)
    planned = _plan_and_train(name, tmp_path, monkeypatch, capsys, 2048)
    assert f"data.train: read as format: {form}" in planned
    assert f"{name}, 10 of 10 rows usable" in planned
    lines = [line.strip() for line in planned.splitlines()]
    assert [line for line in lines if line.startswith("not read:")] == ([unread] if unread else [])
    for part in ("Lyon", *(["weather", "Name of a town"] if name.startswith("glaive") else [])):
        assert part in planned


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [*FILES, "reason_tool_use_demo_50.jsonl", "v1_sft_demo.jsonl", "mllm_demo.json"]
)
def test_the_published_file(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = Path(os.environ.get("RAYTUNE_FT_PEER_FILES", "")) / name
    if not file.is_file():
        pytest.skip(f"RAYTUNE_FT_PEER_FILES names no directory with {name}")
    (tmp_path / name).write_bytes(file.read_bytes())
    print(_plan_and_train(name, tmp_path, monkeypatch, capsys, 16384))


def _plan_and_train(
    name: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    max_length: int,
) -> str:
    """What `plan` says; then trains to the end."""
    monkeypatch.chdir(folder)
    template = vendor_template("qwen3")
    Path("template.jinja").write_text(template)
    save_base_with_marks(template, Path("base"), positions=max_length)
    Path("peer.yaml").write_text(CONFIG.format(path=name, max_length=max_length))
    code = run_command(["plan", "peer.yaml"])
    planned = capsys.readouterr()
    assert code == 0, planned.err
    assert run_command(["train", "peer.yaml"]) == 0, capsys.readouterr().err
    result = json.loads(Path("runs/peer/result.json").read_text())
    assert (result["status"], result["final"]["examples"]) == ("completed", 16)
    return planned.out + planned.err
