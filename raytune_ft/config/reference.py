"""What the schema says about each key: for error messages, overrides and `raytune-ft schema`."""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import annotated_types
from pydantic.fields import FieldInfo

from raytune_ft.config.methods import METHODS, MethodConfig
from raytune_ft.config.schema import Config
from raytune_ft.config.section import NameIn, Section, SectionOf

# Names that other trainers use; their spelling is too far from ours for `closest`.
ELSEWHERE = {
    "learning_rate": "train.lr",
    "per_device_train_batch_size": "train.batch_size",
    "gradient_accumulation_steps": "train.micro_tokens",
    "num_train_epochs": "train.epochs",
    "lr_scheduler_type": "train.lr_schedule",
    "r": "method.rank",
    "lora_r": "method.rank",
    "lora_alpha": "method.alpha",
    "lora_dropout": "method.dropout",
    "target_modules": "method.targets",
    "max_seq_length": "data.max_length",
    "output_dir": "storage",
    "num_samples": "search.trials",
    "num_workers": "parallel.workers",
}
MADE_UP = "KEY"  # in the reference: a key that the user chooses
NAMED = "NAME"  # in the reference: the name of one section of a list


@dataclass(frozen=True)
class Key:
    """One line of the reference. `default` is None where the key must be written."""

    dotted: str
    type: str
    default: str | None
    description: str


def sections_of(annotation: Any) -> list[type[Section]]:
    """The section classes that a field may hold: none for a plain value, several for a union."""
    if annotation is MethodConfig:
        return list(methods().values())
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    for item in typing.get_args(annotation):
        if isinstance(item, SectionOf):
            return item.sections
    if typing.get_origin(annotation) in (typing.Annotated, typing.Union, types.UnionType):
        return [found for item in typing.get_args(annotation) for found in sections_of(item)]
    return []


def listed_sections(annotation: Any) -> list[type[Section]]:
    """The section classes of the list that a field may hold instead of one of its own."""
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is list:
        return sections_of(args[0])
    if origin in (typing.Annotated, typing.Union, types.UnionType):
        return [found for item in args for found in listed_sections(item)]
    return []


def is_listed(parts: Sequence[str]) -> bool:
    """Whether the key at that path may hold a list of sections."""
    field = field_at(parts)
    return field is not None and bool(listed_sections(field.annotation))


def name_of(section: type[Section]) -> str | None:
    """`lora` for a class whose `name` is `Literal["lora"]`; None without such a field."""
    field = section.model_fields.get("name")
    if field is None or typing.get_origin(field.annotation) is not typing.Literal:
        return None
    return str(typing.get_args(field.annotation)[0])


def methods() -> dict[str, type[Section]]:
    """The class of each method's keys, by the method's name."""
    return {name: method.config for name, method in METHODS.items()}


def method_keys(name: str) -> frozenset[str]:
    """The dotted keys of the method of that name, such as `method.rank`.

    A search space over `method.name` gives a trial only the keys of the trial's own method.
    """
    return frozenset(f"method.{key}" for key in methods()[name].model_fields)


def fields_at(parts: Sequence[str], method: object) -> dict[str, FieldInfo]:
    """The keys of the section at that path; empty where there is no section.

    Where `method` names a method, `method` has the keys of that one only, otherwise of all.
    """
    sections: list[type[Section]] = [Config]
    remaining = list(parts)
    while remaining:
        field = _fields(sections, method).get(remaining.pop(0))
        if field is None:
            return {}
        sections = sections_of(field.annotation)
        if typing.get_origin(field.annotation) is dict and remaining:
            remaining.pop(0)
            sections = sections_of(typing.get_args(field.annotation)[1])
        elif remaining and (listed := listed_sections(field.annotation)):
            remaining.pop(0)
            sections = listed
    return _fields(sections, method)


def field_at(parts: Sequence[str], method: object = None) -> FieldInfo | None:
    """The field at that path, None where there is none or the user chose the key."""
    return fields_at(parts[:-1], method).get(parts[-1])


def _fields(sections: list[type[Section]], method: object) -> dict[str, FieldInfo]:
    chosen = [section for section in sections if method and name_of(section) == method] or sections
    return {key: field for section in chosen for key, field in section.model_fields.items()}


def keys() -> Iterator[Key]:
    """Every key that can be written, in the order of the schema."""
    yield from _keys((), [Config])


def _keys(parts: tuple[str, ...], sections: list[type[Section]]) -> Iterator[Key]:
    for section in sections:
        for name, field in section.model_fields.items():
            path = (*parts, name)
            inner = sections_of(field.annotation)
            if not inner or field.description:
                default = None if field.is_required() else shown_default(field)
                yield Key(".".join(path), words(field), default, field.description or "")
            yield from _keys(path, inner)
            seen = set[Key]()  # several sections of a list may share keys
            for item in listed_sections(field.annotation):
                own = item.model_fields.keys() - _fields(inner, None).keys()
                for key in _keys((*path, NAMED), [item]):
                    if key.dotted.rpartition(".")[2] in own and key not in seen:
                        seen.add(key)
                        yield key
            if typing.get_origin(field.annotation) is dict:
                made_up = sections_of(typing.get_args(field.annotation)[1])
                yield from _keys((*path, MADE_UP), made_up)


def closest(word: str, candidates: Iterable[str]) -> str | None:
    """The candidate that `word` most likely misspells; None where no candidate is close."""
    found = difflib.get_close_matches(word, list(candidates), n=1, cutoff=0.6)
    return found[0] if found else None


def suggestion(parts: Sequence[str], method: object) -> str | None:
    """The key that was probably meant by an unknown one: of its own section, else of another."""
    siblings = fields_at(parts[:-1], method)
    near = closest(parts[-1], siblings)
    if near:
        return ".".join([*parts[:-1], near])
    if parts[-1] in ELSEWHERE:
        return ELSEWHERE[parts[-1]]
    fixed = list(dict.fromkeys(key.dotted for key in keys() if not _made_up(key.dotted)))
    moved = [dotted for dotted in fixed if dotted.split(".")[-1] == parts[-1]]
    if len(moved) == 1 and moved != [".".join(parts)]:
        return moved[0]
    return None if siblings else closest(".".join(parts), fixed)


def _made_up(dotted: str) -> bool:
    return not {MADE_UP, NAMED}.isdisjoint(dotted.split("."))


def choices(field: FieldInfo) -> list[str]:
    """The words that a field takes, such as `auto`; empty where it takes any text or number."""
    return _choices(field.annotation, field.metadata)


def _choices(annotation: Any, metadata: Sequence[Any]) -> list[str]:
    if named := _names(metadata):
        return list(named)
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return [str(item) for item in args]
    if origin is typing.Annotated:
        return _choices(args[0], args[1:])
    return [word for item in args for word in _choices(item, ())]


def _names(metadata: Sequence[Any]) -> tuple[str, ...]:
    return next((item.names for item in metadata if isinstance(item, NameIn)), ())


def one_of(names: Iterable[str]) -> str:
    """`a, b or c`."""
    *most, last = names
    return f"{', '.join(most)} or {last}" if most else last


def shown_default(field: FieldInfo) -> str:
    """The default as it would be written in a file."""
    value = field.get_default(call_default_factory=True, validated_data={})
    if isinstance(value, Section):
        value = value.model_dump()
    return shown(value)


def shown(value: Any) -> str:
    """A value in YAML, on one line."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        plain = value.isprintable() and value == value.strip() and value not in ("", "null")
        return value if plain and not _reads_as_number(value) else repr(value)
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {shown(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(shown(item) for item in value) + "]"
    return repr(value)


def _reads_as_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return text in ("true", "false")
    return True


def words(field: FieldInfo) -> str:
    """What a field takes, in words: `a whole number above 0`, `auto or true or false`."""
    return _words(field.annotation, field.metadata)


def _words(annotation: Any, metadata: Sequence[Any]) -> str:
    if named := _names(metadata):
        return one_of(named)
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        inner = [part for item in args[1:] for part in getattr(item, "metadata", [item])]
        return _words(args[0], inner)
    if origin in (typing.Union, types.UnionType):
        if _is_one_or_several(args):
            return f"{_words(args[0], ())}, or a list of those"
        return " or ".join(dict.fromkeys(_words(item, ()) for item in args))
    if origin is typing.Literal:
        return one_of(str(item) for item in args)
    if origin is list and annotated_types.MaxLen(2) in metadata:
        return "[min, max]"
    if origin is list and typing.get_origin(args[0]) is typing.Literal:
        return f"a list of {', '.join(map(str, typing.get_args(args[0])))}"
    if origin is list:
        return f"a list of {_plural(args[0])}"
    if origin is dict:
        return "a mapping" + ("" if not metadata else " with at least one key")
    if annotation in _BASIC:
        return " and ".join([_BASIC[annotation], *map(_bound, metadata)]).replace(" and ", " ", 1)
    return "a section" if sections_of(annotation) else "a value"


def _is_one_or_several(kinds: Sequence[Any]) -> bool:
    """Whether these are a choice of words and a list of words of that choice."""
    word, *others = kinds
    if typing.get_origin(word) is not typing.Literal or len(others) != 1:
        return False
    args = typing.get_args(others[0])
    several = args[0] if typing.get_origin(others[0]) is typing.Annotated else others[0]
    return typing.get_origin(several) is list and typing.get_args(several) == (word,)


_BASIC: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    str: "text",
    bool: "true or false",
    type(None): "null",
}


def _plural(annotation: Any) -> str:
    if sections_of(annotation):
        return "sections"
    return {str: "text", int: "whole numbers", float: "numbers"}.get(annotation, "values")


def _bound(limit: Any) -> str:
    match limit:
        case annotated_types.Gt():
            return f"above {limit.gt}"
        case annotated_types.Ge():
            return f"of at least {limit.ge}"
        case annotated_types.Lt():
            return f"below {limit.lt}"
        case annotated_types.Le():
            return f"of at most {limit.le}"
        case annotated_types.MinLen():
            return "that is not empty"
    return "made of letters, digits, '.', '_' and '-' that begins with a letter or a digit"


def is_under(key: str, prefixes: Sequence[str]) -> bool:
    """Whether a dotted key is in `prefixes` or below one of them."""
    return any(key == prefix or key.startswith(prefix + ".") for prefix in prefixes)
