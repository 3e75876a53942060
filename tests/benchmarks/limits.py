"""Limits that the figures of a benchmark are to keep."""

from __future__ import annotations

from collections.abc import Iterable, Mapping


def missed(
    values: Mapping[str, float | None],
    *,
    smallest: Mapping[str, float],
    largest: Mapping[str, float],
    others: Iterable[str] = (),
) -> list[str]:
    """What is below or above its limit, and what is not there; `others` need only be there."""
    wanted = (*smallest, *largest, *others)
    absent = [f"{name} is not there" for name in wanted if values[name] is None]
    present = {name: value for name, value in values.items() if value is not None}
    below = [
        f"{name} is below {low:g}" for name, low in smallest.items() if present.get(name, low) < low
    ]
    above = [
        f"{name} is above {high:.3g}"
        for name, high in largest.items()
        if present.get(name, high) > high
    ]
    return absent + below + above
