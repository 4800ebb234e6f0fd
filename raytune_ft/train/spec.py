"""What a process needs to know to take part in a run. Importing this module loads no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from raytune_ft.config.schema import Config


@dataclass(frozen=True)
class RunSpec:
    """A run as its processes get it. Paths are absolute."""

    config: Config
    run_dir: Path
    data_dir: Path
    metric: str = "eval_loss"
    mode: str = "min"
