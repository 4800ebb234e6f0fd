"""Turns pydantic's list of errors into the one ConfigError that helps most.

pydantic gives the place; the schema gives what is expected there, so that a union is described once
and as a whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from raytune_ft.config import reference
from raytune_ft.config.data import called
from raytune_ft.config.environment import masked
from raytune_ft.config.methods import DEFAULT_METHOD
from raytune_ft.errors import ConfigError

MAX_SHOWN = 80


def explain(error: ValidationError, data: dict[str, Any]) -> ConfigError:
    """The ConfigError for the most specific of pydantic's errors on `data`."""
    located = [(_path(item, data), item) for item in error.errors()]
    unknown = [pair for pair in located if pair[1]["type"] == "extra_forbidden"]
    longest_first = unknown or [
        pair for pair in located if not any(_is_below(other, pair[0]) for other, _ in located)
    ]
    path, item = longest_first[0]
    method = _scheduler(data) if path[:2] == ("search", "scheduler") else _method(data)
    if item["type"] == "extra_forbidden":
        return unknown_key(path, method)
    if item["type"] == "missing":
        return _missing(path, method)
    if item["type"] == "union_tag_invalid":
        tag = shown_value(_at(data, path).get("name"))
        field = reference.field_at(path)
        assert field is not None
        named = map(reference.name_of, reference.sections_of(field.annotation))
        return _not_one_of((*path, "name"), tag, sorted(filter(None, named)))
    if item["type"] == "value_error":
        rule, _, remedy = str(item["ctx"]["error"]).partition("; ")
        remedy = remedy or "write for example {choice: [8, 16]} or {uniform: [0.1, 0.5]}"
        return ConfigError(".".join(path) + ":", rule, remedy)
    return wrong_value(path, _at(data, path), method)


def unknown_key(path: Sequence[str], method: object) -> ConfigError:
    """The ConfigError for a key that the schema does not have."""
    dotted, section = ".".join(path), ".".join(path[:-1])
    siblings = reference.fields_at(path[:-1], method)
    if path[:2] == ("search", "space") and reference.field_at(path[2:]) is not None:
        wanted = ".".join(path[2:])
        return ConfigError(
            dotted, "is nested", f"write the key with its dots, `{wanted}:`, below search.space"
        )
    near = reference.suggestion(path, method)
    field = reference.field_at(path[:-1], method) if section else None
    items = reference.listed_sections(field.annotation) if field else []
    if any(path[-1] in item.model_fields for item in items):
        remedy = f"it is a key of one of several sources: write {section} as a list"
    elif near:
        remedy = f"did you mean {near}?"
    else:
        remedy = f"the keys {f'of {section}' if section else 'there'} are {', '.join(siblings)}"
    of_name = f" of {path[-2]} {method}" if section in ("method", "search.scheduler") else ""
    return ConfigError(_short(dotted), f"is not a key{of_name}", remedy)


def wrong_value(path: Sequence[str], value: Any, method: object) -> ConfigError:
    """The ConfigError for a value that is not what the schema expects at `path`."""
    field = reference.field_at(path, method)
    shown = shown_value(value)
    if field is None:  # a key that the user chose, such as a resource or a line of the space
        below_space = tuple(path[:2]) == ("search", "space")
        kind = "a section such as {choice: [8, 16]}" if below_space else "a number"
        if tuple(path[:2]) == ("parallel", "label_selector"):
            kind = "a text"
        return ConfigError(f"{'.'.join(path)}={shown}", f"is not {kind}", "write one")
    expected = reference.words(field)
    choices = reference.choices(field)
    if choices == [expected]:
        rule = f"is not supported; {expected} is the only value"
        return ConfigError(f"{'.'.join(path)}={shown}", rule, f"write {expected}")
    near = reference.closest(value, choices) if isinstance(value, str) else None
    remedy = f"did you mean {near}?" if near else _remedy(field, path, value)
    return ConfigError(f"{'.'.join(path)}={shown}", f"is not {expected}", remedy)


def shown_value(value: Any) -> str:
    """A value on one short line, without passwords and tokens."""
    return _short(reference.shown(value))


def _short(text: str) -> str:
    text = masked(text)
    text = text if text.isprintable() else repr(text)
    return text if len(text) <= MAX_SHOWN else text[: MAX_SHOWN - 3] + "..."


def _remedy(field: FieldInfo, path: Sequence[str], value: Any) -> str:
    expected, last = reference.words(field), path[-1]
    if isinstance(value, str) and "number" in expected and _is_number(value):
        return "write it without quotes"
    if "text" in expected and isinstance(value, int | float):
        return "write it in quotes"
    if field.is_required() or field.default is None:
        return f"write one after `{last}:`" if field.is_required() else "write one or leave it out"
    return f"write one, or leave the key out for {reference.shown_default(field)}"


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _missing(path: Sequence[str], method: object) -> ConfigError:
    field = reference.field_at(path, method)
    dotted = ".".join(path)
    if field is None:
        return ConfigError(dotted, "is missing", "write it")
    inner = reference.sections_of(field.annotation)
    if inner:
        must = [key for key, item in inner[0].model_fields.items() if item.is_required()]
        return ConfigError(
            dotted, "is missing", f"write a section `{dotted}` with at least {', '.join(must)}"
        )
    about = f" ({field.description})" if field.description else ""
    return ConfigError(dotted, "is missing", f"write {reference.words(field)}{about}")


def _not_one_of(path: Sequence[str], tag: str, choices: list[str]) -> ConfigError:
    near = reference.closest(tag, choices)
    remedy = f"did you mean {near}?" if near else f"write {reference.one_of(choices)}"
    return ConfigError(f"{'.'.join(path)}={tag}", f"is not {reference.one_of(choices)}", remedy)


def _path(item: ErrorDetails, data: Any) -> tuple[str, ...]:
    """The keys of pydantic's location, without the tags of unions and the indices of lists.

    In a list of sections the name of one is a key, or its number where it has none.
    """
    path: list[str] = []
    here = data
    for position, part in enumerate(item["loc"]):
        is_last = position == len(item["loc"]) - 1
        if isinstance(part, int) and isinstance(here, list) and isinstance(here[part], dict):
            here = here[part]
            path.append(name if isinstance(name := here.get("name"), str) else str(part))
            continue
        if isinstance(part, str) and isinstance(here, list):
            continue  # a tag of a union
        if isinstance(part, int) or not isinstance(here, dict):
            break
        if part in here:
            path.append(part)
            here = here[part]
        elif is_last and item["type"] == "missing":
            path.append(part)
    return tuple(path)


def _is_below(path: Sequence[str], above: Sequence[str]) -> bool:
    return len(path) > len(above) and tuple(path[: len(above)]) == tuple(above)


def _at(data: Any, path: Sequence[str]) -> Any:
    for part in path:
        data = called(data, part) if isinstance(data, list) else data[part]
    return data


def _scheduler(data: dict[str, Any]) -> object:
    search = data.get("search")
    scheduler = search.get("scheduler") if isinstance(search, dict) else None
    return scheduler.get("name", "asha") if isinstance(scheduler, dict) else None


def _method(data: dict[str, Any]) -> object:
    method = data.get("method")
    name = method.get("name", DEFAULT_METHOD) if isinstance(method, dict) else DEFAULT_METHOD
    return name if isinstance(name, str) and name in reference.methods() else None
