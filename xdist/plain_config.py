"""Configurations from plain values, as JSON has them."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

from datapipe.checks import check, describe

Part = TypeVar("Part")


def from_json(part: type[Part], value: Mapping[str, Any]) -> Part:
    """The configuration, or a part of one, whose plain values these are; anything else is a
    `ValueError` that names the field.
    """
    for what, found in (("unknown", _unknown), ("missing", _missing)):
        if names := sorted(found(part, value)):
            raise ValueError(f"{what} fields {', '.join(names)}")
    built: Part = _built(part, value)
    return built


def _unknown(part: type, value: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    types = typing.get_type_hints(part)
    check(isinstance(value, Mapping), prefix.rstrip(".") or "it", value, describe(part))
    for name, item in value.items():
        if name not in types:
            yield f"{prefix}{name}"
        elif dataclasses.is_dataclass(types[name]):
            yield from _unknown(types[name], item, f"{prefix}{name}.")


def _missing(part: Any, value: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    types = typing.get_type_hints(part)
    for field in dataclasses.fields(part):
        if field.name in value and dataclasses.is_dataclass(types[field.name]):
            yield from _missing(types[field.name], value[field.name], f"{prefix}{field.name}.")
        elif field.name not in value and _is_needed(field):
            yield f"{prefix}{field.name}"


def _is_needed(field: dataclasses.Field[Any]) -> bool:
    absent = dataclasses.MISSING
    return field.default is absent and field.default_factory is absent


def _built(part: Any, value: Mapping[str, Any]) -> Any:
    types = typing.get_type_hints(part)
    return part(**{name: _value(types[name], item) for name, item in value.items()})


def _value(kind: Any, item: Any) -> Any:
    if dataclasses.is_dataclass(kind):
        return _built(kind, item)
    return tuple(item) if isinstance(item, list) else item  # JSON has no tuples.
