"""The base class of every section of a config file, and types that several sections use."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from raytune_ft.errors import ConfigError

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_size(text: str, key: str = "--max-shard-size") -> int:
    """Bytes of a size such as 5GB (10^9), 500MB or 2GiB.

    Raises:
        ConfigError: it is not a size.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    unit = _UNITS.get(match[2].upper()) if match else None
    size = int(float(match[1]) * unit) if match and unit else 0
    if size < 1:
        shown = text if len(text) < 60 else f"{text[:57]}..."
        raise ConfigError(f"{key}={shown}", "is not a size", "write for example 5GB or 500MB")
    return size


Positive = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    """Strict: `lr: "fast"` and `batch_size: 1.5` are errors, not conversions."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


@dataclass(frozen=True, eq=False)
class NameIn:
    """Metadata of a text field: it takes the names in `entries`, as they are at validation, and the
    words in `first` and `more`, which come before and after them where the names are printed. An
    entry that is added to the dict is accepted from then on.
    """

    entries: Mapping[str, Any]
    first: tuple[str, ...] = ()
    more: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """Every word that the field takes."""
        return (*self.first, *self.entries, *self.more)

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self._checked, handler(source))

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        return {**handler(schema), "enum": list(self.names)}

    def _checked(self, name: str) -> str:
        if name not in self.names:
            raise PydanticCustomError("name_unknown", "not a known name")
        return name


@dataclass(frozen=True, eq=False)
class SectionOf:
    """Metadata of a field that holds a section: `name` chooses its class, the `config` of the entry
    of that name, as the dict is at validation. Without a `name` it is `default`.
    """

    entries: Mapping[str, Any]
    default: str

    @property
    def sections(self) -> list[type[Section]]:
        """Every class that the field may hold."""
        return [entry.config for entry in self.entries.values()]

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(self._validated)

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        choices = {
            name: entry.config.__pydantic_core_schema__ for name, entry in self.entries.items()
        }
        return handler(core_schema.tagged_union_schema(choices, discriminator="name"))

    def _validated(self, value: Any) -> Section:
        if type(value) in self.sections:
            return value
        if not isinstance(value, dict):
            raise PydanticCustomError("section_type", "not a section")
        name = value.get("name", self.default)
        entry = self.entries.get(name) if isinstance(name, str) else None
        if entry is None:
            raise PydanticCustomError("union_tag_invalid", "not a known name")
        section: Section = entry.config.model_validate(value)
        return section
