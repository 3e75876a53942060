"""Configurations from plain values, as JSON has them."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

Part = TypeVar("Part")


def from_json(part: type[Part], value: Mapping[str, Any]) -> Part:
    """The configuration, or a part of one, whose plain values these are; anything else is a
    `ValueError` or `TypeError`.
    """
    unknown = sorted(_unknown_fields(part, value))
    if unknown:
        raise ValueError(f"unknown fields {', '.join(unknown)}")
    built: Part = _built(part, value)
    return built


def _unknown_fields(part: type, value: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    types = typing.get_type_hints(part)
    for name, item in value.items():
        if name not in types:
            yield f"{prefix}{name}"
        elif dataclasses.is_dataclass(types[name]):
            yield from _unknown_fields(types[name], item, f"{prefix}{name}.")


def _built(part: Any, value: Mapping[str, Any]) -> Any:
    types = typing.get_type_hints(part)
    return part(**{name: _value(types[name], item) for name, item in value.items()})


def _value(kind: Any, item: Any) -> Any:
    if dataclasses.is_dataclass(kind):
        return _built(kind, item)
    return tuple(item) if isinstance(item, list) else item  # JSON has no tuples.
