"""Reads and writes YAML 1.2 as plain dicts, lists, text and numbers."""

from __future__ import annotations

import io
from functools import lru_cache
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.constructor import DuplicateKeyError, SafeConstructor
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from raytune_ft.errors import ConfigError, first_line

MAX_BYTES = 1_000_000
MAX_VALUES = 100_000  # aliases can make a few lines stand for billions of values
MAX_DEPTH = 50


class _Constructor(SafeConstructor):
    """Dates and `=` stay text, as in the core schema of YAML 1.2."""


for _tag in ("timestamp", "value"):
    _Constructor.add_constructor(f"tag:yaml.org,2002:{_tag}", SafeConstructor.construct_yaml_str)


def read_mapping(path: Path) -> dict[str, Any]:
    """The mapping in a file; ConfigError for a file that cannot be read or is not a mapping."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ConfigError(str(path), f"has over {MAX_BYTES} bytes", "name a config file")
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or a NUL in the path
        reason = getattr(error, "strerror", None) or "is not UTF-8 text"
        raise ConfigError(
            ascii(str(path))[1:-1], f"cannot be read ({reason})", "name a config file"
        ) from None
    value = parse(text, str(path))
    if not isinstance(value, dict):
        raise ConfigError(str(path), "is not a mapping", "begin with a line such as `name: my-run`")
    return value


def parse(text: str, source: str) -> Any:
    """The value that a YAML text stands for; `source` is named in the ConfigError."""
    try:
        value = _loaded(text)
    except DuplicateKeyError as error:
        line = _line(error)
        key = str(error.problem).split('"')[1] if '"' in str(error.problem) else "a key"
        raise ConfigError(
            f"{source}{line}", f"writes {key!r} twice", "delete one of the two"
        ) from None
    except YAMLError as error:
        problem = getattr(error, "problem", None) or first_line(error)
        where = _line(error) if isinstance(error, MarkedYAMLError) else ""
        raise ConfigError(
            f"{source}{where}",
            f"is not YAML ({_one_line(problem)})",
            "quote the text or correct it",
        ) from None
    except RecursionError:
        raise ConfigError(source, "is nested too deeply", "write fewer levels") from None
    except (ValueError, KeyError):  # a tag such as !!int over text, or a number of 5,000 digits
        raise ConfigError(
            source, "holds a value that does not match its tag", "correct it"
        ) from None
    return _Plain(source).of(value, 0)


@lru_cache(maxsize=4)
def _loaded(text: str) -> Any:
    """For `parse`, which copies it: a saved config takes 20 ms, and a command reads it often."""
    yaml = YAML(typ="safe", pure=True)
    yaml.Constructor = _Constructor
    return yaml.load(text)


def dump(value: dict[str, Any]) -> str:
    """YAML in the order of the dict; `parse` gives back the same value."""
    yaml = YAML(pure=True)
    yaml.default_flow_style = False
    yaml.allow_unicode = True
    yaml.width = 4096
    stream = io.StringIO()
    yaml.dump(value, stream)
    return stream.getvalue()


def _line(error: MarkedYAMLError) -> str:
    mark = error.problem_mark or error.context_mark
    return f" line {mark.line + 1}" if mark else ""


def _one_line(problem: object) -> str:
    return " ".join(str(problem).split())[:120]


class _Plain:
    """Copies a parsed value; refuses sets, bytes, cycles and too many values."""

    def __init__(self, source: str) -> None:
        self.source, self.seen = source, 0

    def of(self, value: Any, depth: int) -> Any:
        self.seen += 1
        if self.seen > MAX_VALUES or depth > MAX_DEPTH:
            raise ConfigError(
                self.source,
                f"has over {MAX_VALUES} values or {MAX_DEPTH} levels, or refers to itself",
                "write it without aliases",
            )
        if isinstance(value, dict):
            return {self.key(key): self.of(item, depth + 1) for key, item in value.items()}
        if isinstance(value, list):
            return [self.of(item, depth + 1) for item in value]
        if value is None or isinstance(value, str | bool | int | float):
            return value
        kind = type(value).__name__
        raise ConfigError(self.source, f"holds a {kind}", "write text, numbers, lists or mappings")

    def key(self, key: Any) -> str:
        if isinstance(key, str):
            return key
        raise ConfigError(
            self.source, f"has the key {_one_line(key)}, which is not text", "quote it"
        )
