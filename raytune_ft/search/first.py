"""The first trials of a sweep: points that are likely to be good, before anything is known."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from raytune_ft.config.branches import METHOD, branches, contains
from raytune_ft.config.methods import WHOLE_MODEL
from raytune_ft.config.schema import Config
from raytune_ft.config.search import SearchConfig
from raytune_ft.config.search_space import Point, allowed, conditions, trial_count

BASE_LR = 5e-5
LORA_FACTOR = 10.0
REFERENCE_WIDTH = 2000
WIDTH_POWERS = {"llama": 0.781, "qwen": 0.0775}
LR = "train.lr"


def first_points(config: Config, family: str, width: int | None) -> list[Point]:
    """The values of the file, the points of `search.first`, and `published_lr` with the file's
    values otherwise; under `search.defaults: false` the points alone, under a grid none.

    A value outside the space is left out, to be drawn; a point that breaks a constraint or repeats
    another is left out whole. `family` and `width` are transformers' `model_type` and
    `hidden_size`, which few models lack.
    """
    search = config.search
    assert search is not None
    if search.sampler == "grid":
        return []
    written = written_values(config, search)
    wanted: list[tuple[Point, Point]] = [(point, written) for point in search.first]
    if search.defaults:
        wanted.insert(0, ({}, written))
        method = str(written.get(METHOD, config.method.name))
        line = search.space.get(LR)
        known = method in (*WHOLE_MODEL, "lora", "qlora")
        prior = published_lr(method, family, width) if width and known else None
        if line is not None and contains(line, prior):
            wanted.append(({LR: prior}, written))
    points: list[Point] = []
    for given, rest in wanted:
        point = _filled(search, given, rest)
        if point and point not in points and allowed(point, conditions(search)):
            points.append(point)
    return points[: trial_count(search)]


def published_lr(method: str, family: str, width: int) -> float:
    """5e-5 for every weight and ten times that for LoRA, times (2000 / width) ^ power.

    From "LoRA Without Regret" (Schulman et al., Thinking Machines, 2025) and the `get_lr` of its
    tinker-cookbook: the power is 0.781 for Llama and 0.0775 for Qwen; for others, where none was
    published, the rate is not scaled. Fitted at widths from 2048 to 8192; the cookbook has replaced
    it by a table of measured rates since, which lie between 1e-4 and 1e-3. A first guess, no more.
    """
    power = next((each for name, each in WIDTH_POWERS.items() if family.startswith(name)), 0.0)
    factor = 1.0 if method in WHOLE_MODEL else LORA_FACTOR
    return BASE_LR * factor * float((REFERENCE_WIDTH / width) ** power)


def written_values(config: Config, search: SearchConfig) -> Point:
    """The file's own values of the lines that could have drawn them."""
    plain: dict[str, Any] = config.model_dump()
    found: Point = {}
    for key, line in search.space.items():
        here: Any = plain
        for part in key.split("."):
            here = here.get(part) if isinstance(here, dict) else None
        if contains(line, here):
            found[key] = here
    return found


def _filled(search: SearchConfig, given: Point, rest: Mapping[str, Any]) -> Point:
    """`given`, and of `rest` what exists beside it, unless the two break a constraint together."""
    tree = branches(search.space)
    wanted: Point = {}
    for key, value in given.items():
        wanted |= tree.with_needs(key, value)
    wanted |= given
    point: Point = {}
    for key in tree.order:
        if key in wanted:
            point[key] = wanted[key]
        elif key in rest and tree.exists(key, point):
            point[key] = rest[key]
    return point if allowed(point, conditions(search)) else wanted
