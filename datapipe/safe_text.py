"""Text from data sets as it may be shown: nobody's keys and names move a terminal's cursor."""

from __future__ import annotations


def printable(text: str) -> str:
    """The text with control, format and lone surrogate characters spelled out: \\x1b, \\u202e."""
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in text
    )


def shortened(text: str, length: int) -> str:
    """At most `length` characters, an ellipsis where some are left out."""
    return text if len(text) <= length else f"{text[: length - 1]}…"
