"""Checks of keys and sources against the objective. Each raises ConfigError."""

from __future__ import annotations

import re

from raytune_ft.config.data import FORMATS, SourceConfig, listed, source_configs
from raytune_ft.config.explain import shown_value
from raytune_ft.config.objectives import OBJECTIVES, ObjectiveFacts, figures
from raytune_ft.config.reference import is_under, one_of
from raytune_ft.config.schema import Config
from raytune_ft.errors import ConfigError

OF_THE_TEACHER = ("model", "train.precision", "train.kd.teacher")
"""Keys that a teacher's logits depend on, beside the data."""


def check(config: Config) -> None:
    """Raises ConfigError where keys and sources are not those of the objective."""
    train, facts = config.train, OBJECTIVES[config.train.objective]
    for name, source in source_configs(config.data).items():
        label = f"data.{name}"
        if source.format not in facts.formats:
            fits = [name for name, one in OBJECTIVES.items() if source.format in one.formats]
            raise ConfigError(
                f"{label}.format={source.format}",
                f"is not a format that train.objective={train.objective} learns from",
                f"write format: {one_of(facts.formats)}, or train.objective: {one_of(fits)}",
            )
        _check_source(label, source)
    _check_keys(config, facts)
    problem = config.data.problem
    if train.label_smoothing > 0 and not (facts.smooth and problem == "single_label"):
        under = f"data.problem={problem}"
        if not facts.smooth:
            under = f"train.objective={train.objective}"
        raise ConfigError(
            f"train.label_smoothing={train.label_smoothing}",
            f"has no distribution to smooth under {under}",
            "write 0",
        )
    chunk = config.data.chunk
    if chunk is not None and chunk.overlap >= config.data.max_length - 1:
        raise ConfigError(
            f"data.chunk.overlap={chunk.overlap}",
            f"leaves no room for new tokens in data.max_length={config.data.max_length}",
            f"write less than {config.data.max_length - 1}",
        )
    if config.search is not None:
        _check_metrics(config)
        _check_kept_teacher(config)


def _check_keys(config: Config, facts: ObjectiveFacts) -> None:
    train, defaults = config.train, type(config.train).model_fields
    for name, other in OBJECTIVES.items():
        for key in other.keys:
            if key not in facts.keys and getattr(train, key) != defaults[key].default:
                raise ConfigError(
                    f"train.{key}={shown_value(getattr(train, key))}",
                    f"is for train.objective={name}, and this is {train.objective}",
                    f"write train.objective: {name}, or leave the key out",
                )
    if facts.teacher and train.kd is None:
        raise ConfigError(
            f"train.objective={train.objective}",
            "needs a teacher",
            "write train.kd: {teacher: a model}",
        )
    formats = [source.format for source in listed(config.data.train)]
    documents = [name for name, entry in FORMATS.items() if entry.documents]
    if config.data.chunk is not None and not any(FORMATS[name].documents for name in formats):
        raise ConfigError(
            f"data.chunk={shown_value(config.data.chunk.model_dump())}",
            f"cuts documents, and data.train.format={formats[0]} has none",
            f"write format: {one_of(documents)}, or leave the key out",
        )
    if not facts.head and (config.data.labels is not None or config.data.problem != "single_label"):
        key = "labels" if config.data.labels is not None else "problem"
        heads = one_of(name for name, one in OBJECTIVES.items() if one.head)
        raise ConfigError(
            f"data.{key}={shown_value(getattr(config.data, key))}",
            f"is for train.objective={heads}, and this is {train.objective}",
            f"write train.objective: {heads}, or leave the key out",
        )


def _check_source(label: str, source: SourceConfig) -> None:
    owned = dict.fromkeys(key for entry in FORMATS.values() for key in entry.keys)
    for key in owned:
        formats = [name for name, entry in FORMATS.items() if key in entry.keys]
        value = getattr(source, key)
        default = type(source).model_fields[key].default
        if value != default and source.format not in formats:
            raise ConfigError(
                f"{label}.{key}={shown_value(value)}",
                f"is for format: {one_of(formats)}, and this is {source.format}",
                "leave it out",
            )
    if source.rows == "file" and not source.path.lower().endswith(".txt"):
        raise ConfigError(f"{label}.rows=file", "is for .txt files", "leave it out")
    if source.rationale_until is not None:
        try:
            re.compile(source.rationale_until)
        except re.error as error:
            raise ConfigError(
                f"{label}.rationale_until={shown_value(source.rationale_until)}",
                f"is not a regular expression ({error})",
                r"write one such as '####\s*'",
            ) from None


def _check_kept_teacher(config: Config) -> None:
    """The logits file is of one teacher, so no trial may change what they depend on."""
    assert config.search is not None
    if config.train.kd is None or config.train.kd.cache == "memory":
        return
    for key in config.search.space:
        if key == "train.kd" or is_under(key, OF_THE_TEACHER):
            raise ConfigError(
                f"search.space.{key}",
                "changes the teacher's logits, and train.kd.cache=disk keeps those of one teacher",
                "write train.kd.cache: memory, or delete the line",
            )


def _check_metrics(config: Config) -> None:
    assert config.search is not None
    if "train.objective" in config.search.space:
        return
    data, objective = config.data, config.train.objective
    given = [figure.name for figure in figures(objective, data.problem, trained=True)]
    several = data.train if isinstance(data.validation, float) else data.validation
    named = several if isinstance(several, list) else []
    of_sources = [f"eval_loss:{source.called}" for source in named]
    for metric in config.search.metrics:
        if metric not in (*given, *of_sources):
            raise ConfigError(
                f"search.metric={metric}",
                f"is not a figure of train.objective={objective}",
                f"write {one_of((*given, *of_sources))}",
            )
