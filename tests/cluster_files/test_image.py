"""cluster/image: the Dockerfile by hadolint, the locks by constraints.txt. Nothing is built."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
IMAGE = ROOT / "cluster" / "image"
DOCKERFILE = IMAGE / "Dockerfile"
HADOLINT = Path(sys.executable).parent / "hadolint"
PIN = re.compile(r"^([A-Za-z0-9][\w.-]*)==([^\s\\]+)", re.M)


def pins(text: str) -> dict[str, str]:
    return {_normal(name): version for name, version in PIN.findall(text)}


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


@pytest.mark.skipif(not HADOLINT.exists(), reason="no hadolint; pip install .[cluster]")
@pytest.mark.parametrize("planted", ["", "RUN cd /tmp && sudo true\n"])
def test_hadolint(planted: str) -> None:
    text = DOCKERFILE.read_text() + planted
    done = subprocess.run([HADOLINT, "-"], input=text, capture_output=True, text=True, check=False)
    assert (done.returncode == 0) == (planted == ""), done.stdout


def test_each_target_ends_without_root_and_under_an_init() -> None:
    stages = re.split(r"^FROM ", DOCKERFILE.read_text(), flags=re.M)[1:]
    named = {re.search(r"AS (\S+)", each)[1]: each for each in stages}  # type: ignore[index]
    assert 'ENTRYPOINT ["tini"' in named["base"]
    for target in ("cpu", "cuda"):
        assert named[target].startswith("base AS")
        assert re.findall(r"^USER (.*)$", named[target], re.M) == ["1000"]
        assert f"--from={target}-packages" in named[target]
        assert f"--require-hashes -r {target}.lock\n" in named[f"{target}-packages"]


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_the_lock_has_the_tested_versions_with_hashes(target: str) -> None:
    """`make image-locks` writes it anew."""
    text = (IMAGE / f"{target}.lock").read_text()
    locked, tested = pins(text), pins((ROOT / "constraints.txt").read_text())
    differ = {
        name: (version, tested[name])
        for name, version in locked.items()
        if name in tested and version.split("+")[0] != tested[name]
    }
    assert differ == {}
    # Libraries of CUDA are no part of the tests.
    unknown = {name for name in locked.keys() - tested.keys() if target == "cpu"}
    assert unknown <= {"setuptools"}
    entries = re.split(r"^(?=[A-Za-z0-9])", text, flags=re.M)[1:]
    assert all("--hash=sha256:" in each for each in entries)
    needed = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    names = {_normal(re.split(r"[\[><=]", each)[0]) for each in needed}
    assert names <= locked.keys()


def test_the_image_is_named_by_the_version_everywhere() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    files = [path for path in (ROOT / "cluster").rglob("*") if path.is_file()]
    tags = {
        tag
        for path in files
        for tag in re.findall(r"raytune-ft:([\d.]+)-c\w+|newTag: ([\d.]+)-c\w+", path.read_text())
        for tag in tag
        if tag
    }
    assert tags == {version}
