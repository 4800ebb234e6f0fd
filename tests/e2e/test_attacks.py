"""Attacks that SECURITY.md lists as harmless: by a config, by data, by links in a storage.

Others stand beside what they attack: keys of a bucket (unit/checkpoints/test_s3.py), headers of
safetensors (unit/tensors/test_read.py), HTML in a report (unit/report/test_write.py).
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from raytune_ft.cli import run_command
from raytune_ft.report.write import write_report
from tests.support.models import save_tiny_llama
from tests.support.reports import make_sweep_dir

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.e2e

BOMB = "\n".join(
    ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    + [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 10)]
)
FORMATS = "%s%n%x {0} {0.__class__} ${HOME} {{ 7 * 7 }} {% for x in y %} `id` $(id) \\x1b]0;x\\a"


def _bounded() -> None:
    resource.setrlimit(resource.RLIMIT_DATA, (2**30, 2**30))
    resource.setrlimit(resource.RLIMIT_CPU, (60, 60))


@pytest.mark.parametrize(
    "text",
    [
        BOMB,
        "a: &a [*a]",
        "[" * 100_000,
        "{a: " * 10_000,
        "a: !!python/object/apply:os.system ['touch ran']",
        "a: !<tag:yaml.org,2002:python/name:os.system> x",
        "x: " + "y" * 2_000_000,
        "\n".join(f"k{n}: 1" for n in range(20_000)),
    ],
    ids=["bomb", "cycle", "deep list", "deep map", "python", "python tag", "long", "many"],
)
def test_a_config_that_was_made_to_harm(tmp_path: Path, text: str) -> None:
    """One line, within a minute of one CPU and a gigabyte."""
    file = tmp_path / "config.yaml"
    file.write_text(text)
    done = subprocess.run(
        [sys.executable, "-m", "raytune_ft", "train", str(file)],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"},
        preexec_fn=_bounded,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, ""), done.stderr[-2000:]
    assert done.stderr.count("\n") == 1
    assert len(done.stderr) < 1100
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "name", ["../up", "/abs", "a/b", "..", ".hidden", "%s", "{0}", "a\nb", "<b>", "x" * 5000, "a b"]
)
def test_a_name_that_is_no_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    overrides = [f"storage={tmp_path}/runs", f"name={name}", "search=null"]
    assert run_command(["train", str(ROOT / "jobs/quickstart.yaml"), *overrides]) == 2
    said = capsys.readouterr()
    assert said.out.count("\n") <= 1  # where workers compute
    assert said.err.startswith("error: name=" if len(name) < 255 else "error: ")
    assert said.err.count("\n") == 1
    assert len(said.err) < 1100
    assert list(tmp_path.iterdir()) == []


def test_data_are_text_and_nothing_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Format strings, templates, shell, escape codes and a row of two million characters."""
    monkeypatch.chdir(ROOT)
    model = save_tiny_llama(tmp_path / "model")
    rows = [{"prompt": FORMATS, "completion": f"{n} {FORMATS}"} for n in range(30)]
    rows.append({"prompt": "long", "completion": "y" * 2_000_000})
    rows += [{"prompt": "<script>alert(1)</script>", "completion": "</script>\x1b[2J\0"}] * 2
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = tmp_path / "config.yaml"
    config.write_text(
        f"name: a\nstorage: {tmp_path}/runs\nmodel: {{path: {model}}}\n"
        f"data: {{train: {{path: {file}}}, validation: 0.2, max_length: 128}}\n"
        "train: {max_examples: 16, batch_size: 8, precision: float32}\n"
        "promote: {max_overlap: 1.0}\n"
    )
    assert run_command(["train", str(config)]) == 0, capsys.readouterr().err
    assert run_command(["promote", str(tmp_path / "runs/a")]) == 0, capsys.readouterr().err
    assert run_command(["plan", str(config), "name=b"]) == 0
    said = "".join(capsys.readouterr())
    assert "\x1b" not in said
    assert " 49 " not in said  # no template was evaluated
    page = (tmp_path / "runs/a/report.html").read_text()
    assert "<script>alert" not in page
    assert page.count("</script>") == page.count("<script")


def test_a_link_in_a_storage_deletes_nothing_elsewhere(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    private = make_sweep_dir(tmp_path / "private") / "trials" / "trial-000"
    kept = private / "checkpoints" / "step-000001"
    kept.mkdir(parents=True)
    (kept / "model.safetensors").write_text("mine")
    shared = make_sweep_dir(tmp_path / "shared")
    checkpoints = shared / "trials" / "trial-000" / "checkpoints"
    checkpoints.mkdir()
    (checkpoints / "step-000001").symlink_to(kept)
    (checkpoints / ".step-000002.h.1.abcdef0123456789.old").symlink_to(kept)
    assert run_command(["checkpoints", "prune", str(shared), "--keep-last", "1"]) == 0
    run_command(["checkpoints", "verify", str(shared)])
    write_report(shared)
    assert (kept / "model.safetensors").read_text() == "mine"
