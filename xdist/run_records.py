"""The records of a run, as metrics.jsonl has them, one a line."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from datapipe.json_text import parse_json

TRAIN = '"kind": "train"'
"""What a line has that tells how a run trained."""
MOST = 1e15
"""Of a count, and of seconds since 1970."""


def parsed(lines: Iterable[str]) -> Iterable[dict[str, Any]]:
    """Without those that a crash cut short, or a disk has spoilt."""
    for line in lines:
        try:
            value = parse_json(line)
        except ValueError:
            continue
        if isinstance(value, dict):
            yield value


def thinned(lines: Iterable[str], *, every: int) -> Iterable[str]:
    """All lines but those that tell how the run trained, of which every so-manyth."""
    return (line for number, line in enumerate(lines) if number % every == 0 or TRAIN not in line)


def whole(records: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those of this program of which nothing lacks that a report or a chart shows."""
    return [record for record in records if _is_whole(record)]


def _is_whole(record: Mapping[str, Any]) -> bool:
    kind = record.get("kind")
    if not isinstance(kind, str) or kind not in FIELDS:
        return False
    needed = {"time": _is_count, "samples": _is_count, **FIELDS[kind]}
    return all(name in record and allows(record[name]) for name, allows in needed.items()) and all(
        allows(record.get(name)) for name, allows in MAY_LACK.items()
    )


def _is_count(value: object) -> bool:
    return isinstance(value, int | float) and abs(value) < MOST


def _is_value(value: object) -> bool:
    """Of what is measured, which may be none, and may be no number, as a loss may."""
    return value is None or isinstance(value, float) or _is_count(value)


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _are_scores(value: object) -> bool:
    return isinstance(value, dict) and all(
        isinstance(score, float) or _is_count(score) for score in value.values()
    )


Allows = Callable[[object], bool]
FIELDS: Mapping[str, Mapping[str, Allows]] = {
    "start": {},
    "train": {"step": _is_count, "loss": _is_value, "samples_per_s": _is_value},
    "evaluation": {"weights": _is_text, "scores": _are_scores},
    "group": {"num_workers": _is_count},
    "checkpoint": {},
    "recovery": {"cause": _is_text},
}
"""Kind of a record -> what it must have, besides when and where it was."""
MAY_LACK: Mapping[str, Allows] = {
    "num_workers": _is_value,
    "staleness_mean": _is_value,
    "staleness_max": _is_value,
    "step_s": _is_value,
    "data_wait_s": _is_value,
}
