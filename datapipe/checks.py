"""What fields of a configuration may be; anything else is a `ValueError` that names field, value
and choices.
"""

from __future__ import annotations

import math
import types
import typing
from typing import Any, Final

AUTO: Final = "auto"
LARGEST: Final = 2**63 - 1
"""Of whole numbers."""
NAMES: Final = {
    str: "text",
    bool: "true or false",
    int: f"a whole number, at most {LARGEST}",
    float: "a number",
    type(None): "None",
}


def check_types(part: object, prefix: str) -> None:
    """Each field of a dataclass is of its type."""
    for name, kind in typing.get_type_hints(type(part)).items():
        value = getattr(part, name)
        check(_is_of(kind, value), f"{prefix}{name}", value, describe(kind))


def _is_of(kind: Any, value: object) -> bool:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        return any(type(value) is type(choice) and value == choice for choice in arguments)
    if origin in (typing.Union, types.UnionType):
        return any(_is_of(each, value) for each in arguments)
    if origin is tuple:
        return isinstance(value, tuple) and _are_of(arguments, value)
    if kind is int:
        return type(value) is int and abs(value) <= LARGEST
    if kind is float:
        return _is_of(int, value) or type(value) is float
    return isinstance(value, kind)


def _are_of(kinds: tuple[Any, ...], values: tuple[object, ...]) -> bool:
    if kinds[-1] is Ellipsis:
        kinds = kinds[:1] * len(values)
    return len(kinds) == len(values) and all(map(_is_of, kinds, values))


def describe(kind: Any) -> str:
    """The values of a type, for people."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        return " or ".join(map(repr, arguments))
    if origin in (typing.Union, types.UnionType):
        return " or ".join(map(describe, arguments))
    if origin is tuple and arguments[-1] is Ellipsis:
        return f"a list, each of it {describe(arguments[0])}"
    if origin is tuple:
        return f"a list of {', '.join(map(describe, arguments))}"
    return NAMES.get(kind) or f"the fields of {kind.__name__}"


def check(holds: bool, name: str, value: object, allowed: str) -> None:
    """Raise the `ValueError` that names field, value and choices, unless the condition holds."""
    if not holds:
        raise ValueError(f"{name} is {value!r}; allowed: {allowed}")


def check_least(part: object, prefix: str, **lowest: float) -> None:
    """Each named field is finite and at least so much; None and auto pass."""
    for name, low in lowest.items():
        value = getattr(part, name)
        holds = value is None or value == AUTO or low <= value < math.inf
        check(holds, f"{prefix}{name}", value, f"at least {low}{_finite(value)}")


def check_positive(part: object, prefix: str, *names: str) -> None:
    """Each named field is finite and above 0."""
    for name in names:
        value = getattr(part, name)
        check(0 < value < math.inf, f"{prefix}{name}", value, f"above 0{_finite(value)}")


def _finite(value: object) -> str:
    return ", and finite" if value == math.inf else ""


def check_share(part: object, prefix: str, *names: str) -> None:
    """Each named field is at least 0 and below 1; None passes."""
    for name in names:
        value = getattr(part, name)
        check(value is None or 0 <= value < 1, f"{prefix}{name}", value, "at least 0, below 1")
