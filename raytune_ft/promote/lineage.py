"""Where a promoted model comes from: hashes, licences, versions."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub import RepoCard, try_to_load_from_cache

import raytune_ft
from raytune_ft.config.data import source_configs
from raytune_ft.config.schema import Config, ModelConfig
from raytune_ft.data.report import DataReport
from raytune_ft.model.load import resolve_model_path

PACKAGES = ("torch", "transformers", "peft", "ray")
_HASHED = (".safetensors", ".json", ".model", ".jinja")


@dataclass(frozen=True)
class Lineage:
    """Where a promoted model comes from. Paths are left out: hashes say more, and travel."""

    name: str
    config: Config
    config_sha256: str
    base_files: dict[str, str]
    data: DataReport
    trial: str | None
    params: Mapping[str, Any]
    step: int | None
    examples: int | None
    versions: dict[str, str]


def base_name(model: ModelConfig) -> str:
    """The hub id or `builtin:` name; of a local directory its last part alone."""
    return Path(model.path).name if Path(model.path).is_absolute() else model.path


def base_file_hashes(model: ModelConfig) -> dict[str, str]:
    """File name -> sha256 of the base's weights, configuration and tokenizer."""
    directory = Path(resolve_model_path(model.path))
    if not directory.is_dir():
        revision = model.revision or "main"
        cached = try_to_load_from_cache(model.path, "config.json", revision=revision)
        if not isinstance(cached, str):
            return {}
        directory = Path(cached).parent
    hashes = {}
    for file in sorted(directory.iterdir()):
        if file.suffix in _HASHED and file.is_file():
            with file.open("rb") as opened:
                hashes[file.name] = hashlib.file_digest(opened, "sha256").hexdigest()
    return hashes


def known_license(directory: Path) -> str | None:
    """What the model card or dataset card in a directory says; None where it says nothing."""
    card = directory / "README.md"
    if not card.is_file():
        return None
    try:
        found = RepoCard.load(card).data.to_dict().get("license")
    except (OSError, ValueError):  # some other README
        return None
    return str(found) if found else None


def licenses(config: Config) -> dict[str, str]:
    """ "base", "data.train" and so on -> licence, as far as cards beside them say it."""
    places = {"base": config.model.path} | {
        f"data.{name}": str(Path(source.path).parent)
        for name, source in source_configs(config.data).items()
    }
    found = {name: known_license(Path(place)) for name, place in places.items()}
    return {name: text for name, text in found.items() if text is not None}


def package_versions() -> dict[str, str]:
    """What the fold and the evaluation ran with."""
    return {"raytune_ft": raytune_ft.__version__} | {name: version(name) for name in PACKAGES}
