"""What a job takes along: the config and the files that it names, in one archive.

The archive is made here and not by Ray, which would take the whole working directory. So no secret
and no cache leaves this machine, and equal files give an equal archive. In the job, the files lie
below the current directory as they lie below the current directory here.
"""

from __future__ import annotations

import glob
import hashlib
import os
import re
import subprocess
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from raytune_ft.config import paths
from raytune_ft.config.data import CHAT_TEMPLATES, source_configs
from raytune_ft.config.metrics import HARNESS
from raytune_ft.config.rewards import RewardModel, function_of
from raytune_ft.config.schema import Config
from raytune_ft.errors import ConfigError
from raytune_ft.format import size

LIMIT = 100 * 2**20
"""Bytes of all files together. Ray keeps the archive in the memory of the cluster's head."""
SHOWN = 3
"""How many of the largest files the error about the limit names."""
_EPOCH = (1980, 1, 1, 0, 0, 0)
_NAMED_FILE = re.compile(r"[\w./-]+\.(?:ya?ml|jsonl?|csv|tsv|txt|parquet)\b")
_FUNCTION_OF_TASK = re.compile(r"!function\s+([\w.]+)\.\w+")


@dataclass(frozen=True)
class Named:
    """A path in a config. `hub`: it may be an id of the hub instead."""

    key: str
    path: str
    hub: bool = False


@dataclass(frozen=True)
class Package:
    """The files of a job, by their names in it; `config` is the name of the config file."""

    config: str
    files: Mapping[str, Path]

    @property
    def bytes(self) -> int:
        """All files together."""
        return sum(path.stat().st_size for path in self.files.values())

    def write(self, target: Path) -> str:
        """Write the archive, and return its sha256. Equal files give equal bytes."""
        with zipfile.ZipFile(target, "w") as archive:
            for name, path in sorted(self.files.items()):
                entry = zipfile.ZipInfo(name, _EPOCH)
                entry.external_attr = 0o644 << 16
                archive.writestr(entry, path.read_bytes(), zipfile.ZIP_DEFLATED)
        return hashlib.sha256(target.read_bytes()).hexdigest()


def package_of(file: Path, config: Config, cwd: Path, cluster_paths: bool) -> Package:
    """The package of the config that `file` and its overrides stand for.

    With `cluster_paths`, absolute paths are those of the cluster and are left alone.

    Raises:
        ConfigError: the config names a path that the cluster cannot see, a file that is ignored by
            git or does not exist; or the files are larger than `LIMIT`.
    """
    files: dict[str, Path] = {}
    owners: dict[str, str] = {}
    for named in named_paths(config):
        for name, path in packed(named, cwd, cluster_paths).items():
            files[name], owners[name] = path, named.key
    inside = os.path.relpath(file, cwd)
    own = file.name if inside.startswith("..") else inside
    if own in files:
        raise ConfigError(
            str(file),
            f"would be packed under the name of {owners[own]}={own}",
            "rename one of the two files",
        )
    _refuse_ignored(files, owners, cwd)
    package = Package(own, {**files, own: file})
    _refuse_large(package)
    return package


def named_paths(config: Config) -> Iterator[Named]:
    """Every path that a config reads. Those that a run writes, such as `storage`, are not here."""
    yield Named("model.path", config.model.path, hub=True)
    for name, source in source_configs(config.data).items():
        for path in source.paths:
            yield Named(f"data.{name}.path", path, hub=True)
        if source.chat_template not in (None, *CHAT_TEMPLATES):
            yield Named(f"data.{name}.chat_template", source.chat_template)
    promote = config.promote
    if promote.retention is not None:
        for path in promote.retention.paths:
            yield Named("promote.retention.path", path, hub=True)
    if promote.base is not None:
        yield Named("promote.base", promote.base, hub=True)
    if config.train.kd is not None:
        yield Named("train.kd.teacher", config.train.kd.teacher, hub=True)
    if config.parallel.deepspeed is not None:
        yield Named("parallel.deepspeed", config.parallel.deepspeed)
    for metric in promote.metrics:
        task = metric.removeprefix(HARNESS)
        if found := function_of(metric):
            yield Named("promote.metrics", found[0])
        elif task != metric and task.endswith((".yaml", ".yml")):
            yield Named("promote.metrics", task)
    for reward in config.rewards:
        if found := function_of(reward.name):
            yield Named("rewards", found[0])
        if isinstance(reward, RewardModel):
            yield Named(f"rewards.{reward.called}.path", reward.path, hub=True)
    warm = config.search.warm_start if config.search else None
    for folder in [warm] if isinstance(warm, str) else warm or []:
        yield Named("search.warm_start", folder)


def packed(named: Named, cwd: Path, cluster_paths: bool) -> dict[str, Path]:
    """The files to pack for one path, by their names in the package; none for a hub id."""
    key, written = named.key, named.path
    if written.startswith(paths.BUILTIN):
        return {}
    if "${" in written or os.path.isabs(os.path.expanduser(written)):
        if cluster_paths:
            return {}
        raise ConfigError(
            f"{key}={written}",
            "is not below the current directory, and the cluster cannot see this machine",
            "copy it there and write a relative path, or add --cluster-paths if the cluster has "
            "it under this path",
        )
    if named.hub and paths.source(written, cwd, key) == written:
        return {}
    name = os.path.normpath(written)
    path = cwd / name
    if name.startswith(".."):
        raise ConfigError(
            f"{key}={written}",
            "is not below the current directory, and only what is there is packed",
            "run the command in a directory that holds it",
        )
    if path.is_dir():
        return _below(path, name)
    if paths.is_glob(name):
        found = sorted(glob.glob(name, root_dir=cwd, recursive=True))
        if not found:
            raise ConfigError(f"{key}={written}", "matches no file", "write a glob that does")
        return {each: cwd / each for each in found if (cwd / each).is_file()}
    if not path.is_file():
        raise ConfigError(f"{key}={written}", "does not exist", "write the path of a file")
    files = {name: path}
    if key == "promote.metrics" and path.suffix != ".py":
        files |= _of_task(path, name, cwd)
    return files


def _below(folder: Path, name: str) -> dict[str, Path]:
    """The files of a folder without hidden ones and caches."""
    found = {}
    for path in sorted(folder.rglob("*")):
        inner = path.relative_to(folder)
        skipped = any(part.startswith(".") or part == "__pycache__" for part in inner.parts)
        if path.is_file() and not skipped:
            found[f"{name}/{inner.as_posix()}"] = path
    return found


def _of_task(task: Path, name: str, cwd: Path) -> dict[str, Path]:
    """The files that a task of lm-evaluation-harness names: those beside it (`include`,
    `!function`) by their relative paths, data by paths from the current directory.
    """
    text = task.read_text(encoding="utf-8")
    beside = [f"{each.replace('.', '/')}.py" for each in _FUNCTION_OF_TASK.findall(text)]
    folder = os.path.dirname(name)
    named = _NAMED_FILE.findall(text)
    found = [os.path.normpath(os.path.join(folder, each)) for each in [*beside, *named]]
    found += [os.path.normpath(each) for each in named]
    return {
        each: cwd / each
        for each in found
        if not each.startswith(("..", "/")) and (cwd / each).is_file()
    }


def _refuse_ignored(files: Mapping[str, Path], owners: Mapping[str, str], cwd: Path) -> None:
    """ConfigError for a file that git ignores: a secret, a cache, or data that is not meant to be
    copied around. Without git, or outside a repository, nothing is ignored.
    """
    try:
        asked = subprocess.run(  # nosec B607 # the git of the user
            ["git", "check-ignore", "--verbose", "-z", "--stdin"],
            cwd=cwd,
            input="\0".join(files).encode(),
            capture_output=True,
            check=False,
        )
    except OSError:
        return
    if asked.returncode != 0:  # 1: none is ignored; 128: no repository
        return
    fields = asked.stdout.decode().split("\0")
    for source, line, pattern, name in zip(*(fields[i::4] for i in range(4)), strict=False):
        if not pattern.startswith("!"):  # a rule that takes the file back in
            raise ConfigError(
                f"{owners[name]} needs {name}, which",
                f"is ignored by git ({source}:{line}: {pattern}) and so is not packed",
                "copy it to a path that the cluster reads and write that with --cluster-paths, or "
                "`git add -f` it",
            )


def _refuse_large(package: Package) -> None:
    if package.bytes <= LIMIT:
        return
    sizes = {name: path.stat().st_size for name, path in package.files.items()}
    largest = sorted(sizes, key=lambda name: sizes[name], reverse=True)[:SHOWN]
    raise ConfigError(
        f"the package of {size(package.bytes)}",
        f"is larger than {size(LIMIT)}; the largest files are "
        + ", ".join(f"{name} ({size(sizes[name])})" for name in largest),
        "copy them to a path that the cluster reads and write that with --cluster-paths",
    )
