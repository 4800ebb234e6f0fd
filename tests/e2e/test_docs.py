"""The documentation is true: its configs load, its commands run, its messages are printed.

A page is one session in an empty directory that holds `jobs/` and a few small files. Its blocks are
run from top to bottom on 60 rows instead of the whole data set. A sweep is checked by `plan` and
stood in for by one run and its promotion, which leave the same directory without a cluster.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from ruamel.yaml import YAML

from raytune_ft.cli import app, run_command
from raytune_ft.config.data import FORMATS
from raytune_ft.config.load import load_config
from raytune_ft.config.merging import MERGES
from raytune_ft.config.search import SCHEDULERS

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
ROWS = ROOT / "jobs" / "data" / "tiny_instructions" / "train.jsonl"
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.M | re.S)
LINK = re.compile(r"\[[^]]*\]\(([^)\s]+)\)")
ROW = re.compile(r"^\| (`+)(raytune-ft .*?)\1 \| (`+)(.*?) ?\3 \|$", re.M)
COMMAND = re.compile(r"raytune-ft (\w+) ?(.*)|.* python jobs/(\w+)\.py (.*)")
BASE: dict[str, Any] = {"name": "fragment", "data": {"train": {"path": "train.jsonl"}}}
SPACE = {"train.lr": {"log_uniform": [1e-5, 1e-3]}}
COLUMNS = "prompt: instruction, completion: response"
# For `plan`: what every machine has.
HERE = [
    "storage=runs",
    "model.path=builtin:tiny",
    f"data.train={{path: {ROWS.relative_to(ROOT)}, {COLUMNS}}}",
    f"data.test={{path: short.jsonl, {COLUMNS}}}",
    "promote.max_overlap=1",
]
# For runs: 60 rows, in this process.
SHRUNK = [
    *HERE,
    f"data.train={{path: short.jsonl, {COLUMNS}}}",
    "parallel={}",
]

pytestmark = pytest.mark.e2e


@pytest.fixture
def session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current directory of a page."""
    (tmp_path / "jobs").symlink_to(ROOT / "jobs")
    rows = ROWS.read_text().splitlines(keepends=True)
    (tmp_path / "short.jsonl").write_text("".join(rows[:60]))
    bad = [json.dumps({"instruction": f"row {n}", "response": "x"}) for n in range(40)]
    bad[3] = json.dumps({"instruction": "row 3", "response": ""})
    bad[7] = json.dumps({"instruction": "row 7", "response": 7})
    (tmp_path / "bad.jsonl").write_text("\n".join(bad))
    (tmp_path / "empty.jsonl").touch()
    alone = {"messages": [{"role": "user", "content": "Is anybody here?"}]}
    (tmp_path / "monologue.jsonl").write_text(json.dumps(alone) + "\n")
    labelled = [{"text": f"text {n}", "label": ["up", "down"][n % 2]} for n in range(8)]
    (tmp_path / "classes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in labelled))
    (tmp_path / "twice.yaml").write_text("name: a\nname: b\n")
    monkeypatch.chdir(tmp_path)
    for name in ("DB_PASSWORD", "RAY_ADDRESS", "RAYTUNE_FT_STORAGE"):
        monkeypatch.delenv(name, raising=False)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    entries = [(each, dict(each)) for each in (FORMATS, MERGES, SCHEDULERS)]
    yield tmp_path
    torch.set_num_threads(threads)
    for each, before in entries:  # what docs/extending.md adds
        each.clear()
        each.update(before)  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_blocks(page: Path, session: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for language, text in BLOCK.findall(page.read_text()):
        if language == "yaml":
            _load(text, session)
        elif language == "python":
            exec(compile(text, f"{page.name}:python", "exec"), {})
        elif language == "bash":
            for line in text.replace("\\\n", " ").splitlines():
                _run(line, capsys)
        else:
            assert language == "text", f"a block of {language} in {page.name} is not tested"


def _load(text: str, folder: Path) -> None:
    """A whole config as it stands, a fragment over a small base; saved as NAME.yaml."""
    value = YAML(typ="safe", pure=True).load(text)
    if "name" not in value:
        value = _merged(BASE, value)
        if "search" in value:
            value["search"].setdefault("space", SPACE)
    file = folder / f"{value['name']}.yaml"
    with file.open("w") as stream:
        YAML(typ="safe", pure=True).dump(value, stream)
    load_config(file)


def _merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    both = {key: base[key] for key in base.keys() & over.keys()}
    inner = {
        key: _merged(value, over[key])
        for key, value in both.items()
        if isinstance(value, dict) and isinstance(over[key], dict)
    }
    return {**base, **over, **inner}


def _run(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = shlex.split(line, comments=True)
    for target in words[1:] if words[:1] == ["make"] else ():
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M), line
    found = COMMAND.fullmatch(shlex.join(words))
    if found is None:
        assert words[:1] != ["raytune-ft"], line
        return
    command = found[1] or found[3]
    arguments = shlex.split(found[2] or found[4] or "")
    _parse(command, arguments)
    if found[3]:
        assert (ROOT / "jobs" / f"{command}.py").is_file()
    if command in ("plan", "sweep") or (found[3] and command != "promote"):
        _succeed("plan", *[word for word in arguments if word != "--resume"], *HERE)
    if found[3] or command == "plan":
        return
    if command == "sweep":
        _succeed("train", *arguments, *SHRUNK)
        run = next(Path("runs").glob(_name(arguments)), None)
        if run is not None and not (run / "promoted").exists():
            _succeed("promote", str(run))
    elif command in ("train", "evaluate"):
        _succeed(command, *arguments, *SHRUNK)
    else:
        _succeed(command, *arguments)
    assert capsys.readouterr().err == "", line


def _parse(command: str, arguments: list[str]) -> None:
    """Options and arguments are those of the command; raises a usage error."""
    group: Any = typer.main.get_command(app)
    _, found, rest = group.resolve_command(group.make_context("raytune-ft", []), [command])
    assert rest == []
    found.make_context(command, list(arguments))


def _succeed(*arguments: str) -> None:
    assert run_command(arguments) == 0, shlex.join(arguments)


def _name(arguments: list[str]) -> str:
    return next((word[5:] for word in arguments if word.startswith("name=")), "quickstart")


def test_every_message_is_printed(
    session: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _succeed("train", "jobs/quickstart.yaml", "name=first", *SHRUNK)
    _succeed("promote", "runs/first")
    sections = (ROOT / "docs" / "errors.md").read_text().split("\n## ")
    count = 0
    for section in sections:
        with monkeypatch.context() as patch:
            _stage(section.splitlines()[0], patch)
            for _, command, _, message in ROW.findall(section):
                count += 1
                expected = (1 if section.startswith("A run that fails") else 2, message)
                arguments = shlex.split(command)[1:]
                if "name=first" in arguments and len(arguments) > 3:
                    arguments += SHRUNK
                capsys.readouterr()
                code = run_command(arguments)
                printed = capsys.readouterr().err.replace(str(session), "$PWD")
                assert (code, printed) == (expected[0], f"error: {expected[1]}\n"), command
    tables = re.findall(r"^\| `+raytune-ft", "\n".join(sections), re.M)
    assert count == len(tables) > 30


def _stage(heading: str, patch: pytest.MonkeyPatch) -> None:
    """What the heading of a table says of the place."""
    if heading == "Inside a Ray job":
        patch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    elif heading == "On a cluster of one node with 2 CPUs":
        from raytune_ft.ray_backend import cluster as ray_cluster
        from raytune_ft.ray_backend import run_handle as ray_train

        patch.setattr(ray_train, "connected", nullcontext)
        patch.setattr(ray_cluster, "_alive_nodes", lambda: [{"CPU": 2.0}])


def test_the_reference_is_up_to_date(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["schema", "--reference"]) == 0
    printed = capsys.readouterr().out
    text = (ROOT / "docs" / "config.md").read_text()
    assert f"<!-- reference -->\n```text\n{printed}```\n" in text, (
        "paste what `raytune-ft schema --reference` prints between the marks in docs/config.md"
    )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_resolve_and_no_machine_is_named(page: Path) -> None:
    text = page.read_text()
    for target in LINK.findall(BLOCK.sub("", text)):
        assert target.startswith("https://") or (page.parent / target).is_file(), target
    assert not re.search(r"(?<![\w.$])/(work|home|root|tmp|farm|Users)\b", text)


def test_every_page_is_linked_from_the_readme() -> None:
    links = LINK.findall((ROOT / "README.md").read_text())
    assert {f"docs/{page.name}" for page in PAGES[1:]} <= set(links)


def test_every_command_is_in_the_readme() -> None:
    group: Any = typer.main.get_command(app)
    text = (ROOT / "README.md").read_text()
    assert all(f"| `raytune-ft {name}" in text for name in group.commands)
