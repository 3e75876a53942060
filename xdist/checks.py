"""What fields of a configuration may be; anything else is a `ValueError` that names field, value
and choices.
"""

from __future__ import annotations

import math
from typing import Final

AUTO: Final = "auto"


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
