"""The records of a run, as metrics.jsonl has them, one a line."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

TRAIN = '"kind": "train"'
"""What a line has that tells how a run trained."""


def parsed(lines: Iterable[str]) -> Iterable[dict[str, Any]]:
    """Without those that a crash cut short."""
    for line in lines:
        try:
            yield json.loads(line)
        except ValueError:
            continue


def thinned(lines: Iterable[str], *, every: int) -> Iterable[str]:
    """All lines but those that tell how the run trained, of which every so-manyth."""
    return (line for number, line in enumerate(lines) if number % every == 0 or TRAIN not in line)
