"""Models of the Hugging Face hub: which a config names, at which commit, and one download a node.

Importing this module loads no torch.
"""

from __future__ import annotations

import errno
import math
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raytune_ft.background import repeated
from raytune_ft.config.environment import expand_text
from raytune_ft.config.paths import is_hub_model
from raytune_ft.config.rewards import RewardModel
from raytune_ft.config.schema import Config, ModelConfig
from raytune_ft.errors import ModelError, StorageError, first_line
from raytune_ft.files import write_text_atomic
from raytune_ft.format import size
from raytune_ft.locks import Wait, locked
from raytune_ft.records import Tell

WANTED = ("*.safetensors", "*.json", "*.model", "*.tiktoken", "*.jinja", "*.txt", "*.py")
UNWANTED = (
    *("*/*.safetensors", "*/*.json", "*/*.model", "*/*.txt", "*/*.py"),
    *("consolidated*.safetensors", "*.fp16*.safetensors"),
)
"""Other copies of the weights: of other libraries, or rounded."""
TELL_EVERY_S = 10.0
_pinned: dict[tuple[str, str], str] = {}


def trained_models(config: Config) -> list[ModelConfig]:
    """The models of the hub that each worker of a run loads."""
    models = [config.model]
    if config.train.kd is not None and config.train.kd.cache == "memory":
        models.append(teacher_model(config))
    return [model for model in models if is_hub_model(model.path)]


def named_models(config: Config) -> dict[str, ModelConfig]:
    """Every model of the hub that a config names, by its key and path."""
    models = {"model.path": config.model}
    if config.train.kd is not None:
        models["train.kd.teacher"] = teacher_model(config)
    if config.promote.base is not None:
        models["promote.base"] = at_path(config.model, config.promote.base)
    for reward in config.rewards:
        if isinstance(reward, RewardModel):
            models[f"rewards.{reward.called}.path"] = reward_model(reward)
    return {
        f"{key}={model.path}": model for key, model in models.items() if is_hub_model(model.path)
    }


def teacher_model(config: Config) -> ModelConfig:
    """The `model` section of the teacher, which is loaded in the same way as the student."""
    assert config.train.kd is not None
    return at_path(config.model, config.train.kd.teacher)


def reference_model(config: Config) -> ModelConfig:
    """The `model` section of the model that a run on preferences is held to."""
    return at_path(config.model, config.train.dpo.reference or config.model.path)


def reward_model(reward: RewardModel) -> ModelConfig:
    """The `model` section of a reward model, which runs no code of its own."""
    path = expand_text(reward.path, f"rewards.{reward.called}.path")
    return ModelConfig(path=path, revision=reward.revision)


def at_path(model: ModelConfig, path: str) -> ModelConfig:
    """The `model` section of another model. A revision belongs to the path beside it."""
    return (
        model if path == model.path else model.model_copy(update={"path": path, "revision": None})
    )


def given_model(model: ModelConfig, path: Path) -> ModelConfig:
    """The `model` section of MODEL_DIR, a directory or the name of a model. A directory keeps the
    revision, since it may name the code of the config's model on the hub.
    """
    revision = model.revision if path.is_dir() else None
    return model.model_copy(update={"path": str(path), "revision": revision})


def pin(model: ModelConfig, commit: str) -> None:
    """From now on this process loads the model at this commit."""
    _pinned[model.path, model.revision or "main"] = commit


def revision_of(model: ModelConfig) -> str:
    """The commit that this process was told, else the branch, tag or commit of the config."""
    written = model.revision or "main"
    return _pinned.get((model.path, written), written)


def commit_of(model: ModelConfig) -> str:
    """The commit that a model's revision is now; that of the cache where the hub does not answer.

    Raises:
        ModelError: the hub does not answer, and the cache has none.
    """
    from huggingface_hub import resolve_revision

    try:
        return resolve_revision(model.path, revision=revision_of(model)).resolved
    except Exception as error:  # the errors of whichever HTTP client the hub's library has
        raise _refused(model, error) from error


def snapshot(model: ModelConfig, revision: str) -> Path:
    """The directory of a model, after a download of what is missing there."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import tqdm  # type: ignore[attr-defined]

    class OnTerminals(tqdm):
        def __init__(self, *arguments: Any, **more: Any) -> None:
            super().__init__(*arguments, **{**more, "disable": not sys.stderr.isatty()})

    return Path(
        snapshot_download(
            model.path,
            revision=revision,
            allow_patterns=list(WANTED),
            ignore_patterns=list(UNWANTED),
            tqdm_class=OnTerminals,
        )
    )


@dataclass(frozen=True)
class Fetched:
    """What lies on a machine. `new`: it was downloaded just now."""

    folder: str
    bytes: int
    new: bool


@dataclass(frozen=True)
class Download:
    """A model or a data set. `key` names it as the config does, `machine` is the node's."""

    key: str
    machine: str
    found: Fetched


def fetch(model: ModelConfig, commit: str, tell: Tell = lambda line: None) -> Fetched:
    """Download a model to this node, or wait for the process that does.

    Raises:
        ModelError: the hub does not answer, or refuses.
        StorageError: the disk of the cache is full.
    """
    with _alone(model, tell), _progress(model, tell):
        before = _held(_cache_of(model))
        try:
            folder = snapshot(model, commit)
            _remember(model, commit)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise _refused(model, error) from error
            cache = str(_cache_of(model).parent)
            raise StorageError(
                cache, f"has no room for {model.path}", "make room, or export another HF_HOME"
            ) from error
        except Exception as error:  # as in `commit_of`
            raise _refused(model, error) from error
        new = _held(_cache_of(model)) > before
    return Fetched(str(folder), _held(folder), new)


def fetch_here(config: Config, tell: Tell) -> None:
    """Download what this process is to train with, before it loads it; raises as `fetch` does."""
    for model in trained_models(config):
        commit = commit_of(model)
        fetch(model, commit, tell)
        pin(model, commit)


def _remember(model: ModelConfig, commit: str) -> None:
    """Write which commit the revision was, so that the model is found without a network."""
    written = model.revision or "main"
    reference = _cache_of(model) / "refs" / written
    if written != commit and not (reference.is_file() and reference.read_text() == commit):
        reference.parent.mkdir(parents=True, exist_ok=True)
        write_text_atomic(reference, commit)


@contextmanager
def _alone(model: ModelConfig, tell: Tell) -> Iterator[None]:
    """One process of this node at a time; where the cache's disk has no locks, the hub's library
    keeps processes from the same file.
    """
    folder = _cache_of(model).parent / ".locks"
    path = folder / f"{_cache_of(model).name}.raytune-ft"
    rule = f"is locked by a process that downloads {model.path}"
    with ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(path, rule, "wait for it", Wait(math.inf, tell)))
        except (OSError, StorageError) as error:
            tell(f"other processes may download {model.path} too: {first_line(error)}")
        yield


@contextmanager
def _progress(model: ModelConfig, tell: Tell) -> Iterator[None]:
    """Tells now and then how much of the model is there; on a terminal a bar does."""
    if sys.stderr.isatty():
        yield
        return
    begun = time.monotonic()

    def say() -> None:
        held, passed = size(_held(_cache_of(model))), time.monotonic() - begun
        tell(f"downloading {model.path}: {held} after {passed:.0f} s")

    with repeated(say, TELL_EVERY_S, "download"):
        yield


def _cache_of(model: ModelConfig) -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE) / f"models--{model.path.replace('/', '--')}"


def _held(folder: Path) -> int:
    """Bytes of the files below; a link counts as the file that it stands for, once."""
    files = {path.resolve() for path in folder.rglob("*")}
    total = 0
    for path in files:
        try:
            total += path.stat().st_size if path.is_file() else 0
        except FileNotFoundError:  # a part of a download that has just become whole
            continue
    return total


def _refused(model: ModelConfig, error: Exception) -> ModelError:
    return ModelError(
        f"model.path={model.path}",
        f"cannot be downloaded ({first_line(error)})",
        "write a hub id that this machine can reach, with HF_TOKEN where it is gated; without a "
        "network, run `raytune-ft fetch` where there is one and copy HF_HOME, or write a directory",
    )
