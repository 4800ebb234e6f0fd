"""The documentation is true: its configs load and its commands run.

A page is one session in an empty directory that holds `jobs/` and a few small files. In `make test`
every config and every command line of every page is checked, and the blocks of the pages that train
little are run; `make test-slow` runs those of all pages, with sweeps on a local Ray cluster. Runs
see 60 rows instead of the whole data set.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
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
from raytune_ft.config.methods import METHODS
from raytune_ft.config.objectives import OBJECTIVES
from raytune_ft.config.search import SCHEDULERS
from raytune_ft.config.strategies import STRATEGIES
from tests.e2e.test_bad_inputs import refused, write_bad_files

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
CLUSTER_PAGES = sorted((ROOT / "docs" / "cluster").glob("*.md"))
"""Their blocks need clusters: only lines of ours are checked. tests/cluster_files reads the files
that they name."""
ROWS = ROOT / "jobs" / "data" / "tiny_instructions" / "train.jsonl"
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.M | re.S)
DICTS = (FORMATS, MERGES, METHODS, OBJECTIVES, SCHEDULERS, STRATEGIES)
LINK = re.compile(r"\[[^]]*\]\(([^)\s]+)\)")
REFUSAL = re.compile(r"^\$ (raytune-ft .*)\nerror: (\S+)", re.M)
COMMAND = re.compile(r"raytune-ft (\w+) ?(.*)|.* python jobs/(\w+)\.py (.*)")
NOT_RUN = {
    r"make \w+": "a target of the Makefile, which must exist; it would run for minutes",
    r"pip install -c constraints\.txt \.": "installs this checkout, which runs the test already",
    r"export (RAYTUNE_FT_STORAGE|RAY_ADDRESS|RAY_AUTH_MODE)=\S+": "of a cluster that is not here",
    r"ray start --head": "a cluster that outlives the test; tests/e2e/test_ray_job.py has one",
    r"ray get-auth-token --generate '>' /dev/null": "writes into the home directory",
}
"""Patterns of the other lines that a page may hold, with the reason why they are not run."""
JOBS = ("submit", "status", "logs", "stop")
"""Commands against a cluster that is not here, as is `--address`; tests/e2e/test_submit.py and
tests/multihost/test_doctor.py run them."""
BATCH = "cluster/slurm/raytune.sbatch "
"""Runs the command that follows it."""
STARTS = ("train", "sweep", "evaluate", "promote", "export", "sample")
"""Commands that compute for seconds."""
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

pytestmark = [pytest.mark.e2e, pytest.mark.usefixtures("traced_once")]


@pytest.fixture
def session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current directory of a page."""
    (tmp_path / "jobs").symlink_to(ROOT / "jobs")
    write_bad_files(tmp_path)
    monkeypatch.chdir(tmp_path)
    addresses = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")
    for name in ("DB_PASSWORD", "RAYTUNE_FT_STORAGE", *addresses):
        monkeypatch.delenv(name, raising=False)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    entries = [(each, dict(each)) for each in DICTS]
    yield tmp_path
    torch.set_num_threads(threads)
    for each, before in entries:  # what docs/extending.md adds
        each.clear()
        each.update(before)  # type: ignore[arg-type]


def _commands(page: Path) -> list[str]:
    """Every line of the page's bash blocks, without comments."""
    return [
        shlex.join(words)
        for language, text in BLOCK.findall(page.read_text())
        if language == "bash"
        for line in text.replace("\\\n", " ").splitlines()
        if (words := shlex.split(line, comments=True))
    ]


def _marked(page: Path) -> Any:
    started = [line for line in _commands(page) if line.split()[1:2] and line.split()[1] in STARTS]
    sweeps = any(" sweep " in line for line in started)
    marks = [pytest.mark.timeout(1800)]
    if sweeps or len(started) > 1:
        marks.append(pytest.mark.slow)
    if sweeps:
        marks.append(pytest.mark.ray)
    return pytest.param(page, marks=marks, id=page.name)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_configs_load_and_command_lines_parse(page: Path, session: Path) -> None:
    for language, text in BLOCK.findall(page.read_text()):
        if language == "yaml":
            _load(text, session)
        else:
            known = ("bash", "python", "text")
            assert language in known, f"a block of {language} in {page.name} is not tested"
    for line in _commands(page):
        if (found := _parsed(line)) is None:
            continue
        command, arguments, _ = found
        overrides = [word for word in arguments[1:] if "=" in word]
        if command in ("plan", "train", "sweep", "submit"):
            load_config(Path(arguments[0]), [*overrides, *_with(HERE, arguments)])


@pytest.mark.parametrize("page", CLUSTER_PAGES, ids=lambda page: page.name)
def test_command_lines_for_clusters_parse(page: Path) -> None:
    for line in _commands(page):
        files = [word for word in shlex.split(line) if word.startswith("cluster/")]
        assert all((ROOT / file).exists() for file in files), line
        ours = f"raytune-ft {line.partition(BATCH)[2]}" if BATCH in line else line
        if ours.startswith(("raytune-ft ", "make ")):
            _parsed(ours)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("page", [_marked(page) for page in PAGES])
def test_blocks_run(page: Path, session: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for language, text in BLOCK.findall(page.read_text()):
        if language == "yaml":
            _load(text, session)
        elif language == "python":
            exec(compile(text, f"{page.name}:python", "exec"), {})
        elif language == "bash":
            for line in text.replace("\\\n", " ").splitlines():
                if words := shlex.split(line, comments=True):
                    _run(shlex.join(words), capsys)


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


def _parsed(line: str) -> tuple[str, list[str], bool] | None:
    """Name and arguments of a command of ours, and whether a Ray job runs it; None for a line of
    `NOT_RUN`. Fails for every other line.
    """
    found = COMMAND.fullmatch(line)
    if found is None:
        assert any(re.fullmatch(pattern, line) for pattern in NOT_RUN), f"not tested: {line}"
        if line.startswith("make "):
            target = line.split()[1]
            assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M), line
        return None
    command = found[1] or found[3]
    arguments = shlex.split(found[2] or found[4] or "")
    if found[3]:
        assert (ROOT / "jobs" / f"{command}.py").is_file()
    group: Any = typer.main.get_command(app)
    _, known, rest = group.resolve_command(group.make_context("raytune-ft", []), [command])
    assert rest == []
    known.make_context(command, list(arguments))  # raises a usage error
    return command, arguments, bool(found[3])


def _run(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Run a command of ours; one that a Ray job runs is planned, a sweep is planned and run."""
    if (found := _parsed(line)) is None:
        return
    command, arguments, in_a_job = found
    if command in ("plan", "sweep") or (in_a_job and command == "train"):
        rest = [word for word in arguments if word != "--resume"]
        _succeed("plan", *rest, *_with(HERE, arguments))
    if in_a_job or command in ("plan", *JOBS) or "--address" in arguments:
        return
    if command == "doctor":
        _examine(arguments, capsys)
        return
    starts = command in ("train", "sweep", "evaluate", "sample")
    small = _with(SHRUNK, arguments) if starts else []
    # The grace period of a scheduler is longer than a run of 60 rows.
    _succeed(command, *arguments, *small, *["search.scheduler=null"] * (command == "sweep"))
    assert capsys.readouterr().err == "", line


def _with(overrides: list[str], arguments: list[str]) -> list[str]:
    """Without other rows, where a config reads pairs or prompts."""
    files = [Path(word) for word in arguments if word.endswith(".yaml")]
    texts = [file.read_text() for file in files]
    prompts = any("format: prompt}" in text for text in texts)
    own = prompts or any("format: preference" in text for text in texts)
    short = ["train.max_examples=32"] * (prompts and overrides is SHRUNK)
    return [word for word in overrides if not (own and word.startswith("data."))] + short


def _examine(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """This machine may have defects, such as the clusters of other tests."""
    capsys.readouterr()
    code = run_command(["doctor", *arguments, *(HERE if arguments else [])])
    said = "".join(capsys.readouterr())
    verdict = {0: r"^verdict: 0 defects, ", 1: r"^error: [1-9]\d* defects?, "}[code]
    assert re.search(verdict, said, re.M), said


def _succeed(*arguments: str) -> None:
    assert run_command(arguments) == 0, shlex.join(arguments)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_refusals_on_the_page_of_errors_begin_with_the_same_key(session: Path) -> None:
    examples = REFUSAL.findall((ROOT / "docs" / "errors.md").read_text())
    assert len(examples) > 4
    for command, key in examples:
        line = refused(command).replace(str(session), "$PWD")
        assert line.startswith(f"error: {key}"), command


def test_the_reference_is_up_to_date(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["schema", "--reference"]) == 0
    printed = capsys.readouterr().out
    text = (ROOT / "docs" / "config.md").read_text()
    assert f"<!-- reference -->\n```text\n{printed}```\n" in text, (
        "paste what `raytune-ft schema --reference` prints between the marks in docs/config.md"
    )


@pytest.mark.parametrize("page", PAGES + CLUSTER_PAGES, ids=lambda page: page.name)
def test_links_resolve_and_no_machine_is_named(page: Path) -> None:
    text = page.read_text()
    for target in LINK.findall(BLOCK.sub("", text)):
        assert target.startswith("https://") or _is_there(page, target), target
    assert not re.search(r"(?<![\w.$])/(work|home|root|tmp|farm|Users)\b", text)


def _is_there(page: Path, target: str) -> bool:
    """Whether the file is there, and the heading, if one is named, in it."""
    name, _, heading = target.partition("#")
    file = page.parent / name if name else page
    if not file.is_file() or not heading:
        return file.is_file()
    headings = re.findall(r"^#+ (.+)$", BLOCK.sub("", file.read_text()), re.M)
    return heading in {re.sub(r"[^\w -]", "", each).lower().replace(" ", "-") for each in headings}


def test_every_page_is_linked_from_the_readme() -> None:
    links = LINK.findall((ROOT / "README.md").read_text())
    assert {f"docs/{page.name}" for page in PAGES[1:]} <= set(links)


def test_every_command_is_in_the_readme() -> None:
    group: Any = typer.main.get_command(app)
    text = (ROOT / "README.md").read_text()
    assert all(f"| `raytune-ft {name}" in text for name in group.commands)
