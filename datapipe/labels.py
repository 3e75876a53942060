"""labels.json: the labels of a data set, by id, with their names and weights."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass

from datapipe.errors import BadLabels
from datapipe.json_text import parse_json
from datapipe.storage import read_bytes, write_bytes

LABELS_NAME = "labels.json"


@dataclass(frozen=True)
class Label:
    """One label."""

    id: int
    name: str
    weight: float
    """Share of the training images that carry the label."""


def read_labels(url: str) -> tuple[Label, ...]:
    """The labels of a file, by id: 0, 1, 2, ... without gaps, names differ; else `BadLabels`.

    `UnreadableUrl` where storage does not deliver it.
    """
    try:
        labels = [
            Label(int(entry["id"]), str(entry["name"]), float(entry["weight"]))
            for entry in parse_json(read_bytes(url))
        ]
    except (FileNotFoundError, NotADirectoryError) as error:
        raise BadLabels(url, "there is no such file") from error
    except (ValueError, TypeError, KeyError, OverflowError) as error:
        raise BadLabels(url, f'not a list of {{"id", "name", "weight"}}: {error!r}') from error
    labels.sort(key=lambda label: label.id)
    if [label.id for label in labels] != list(range(len(labels))):
        raise BadLabels(url, "ids are not 0, 1, 2, ... without gaps")
    if unweighed := [label for label in labels if not 0 <= label.weight < math.inf]:
        raise BadLabels(url, f"the weight of {unweighed[0].name!r} is {unweighed[0].weight}")
    if len({label.name for label in labels}) != len(labels):
        raise BadLabels(url, "two labels have the same name")
    return tuple(labels)


def write_labels(url: str, labels: Iterable[Label]) -> None:
    lines = ",\n".join(json.dumps(asdict(label)) for label in labels)
    write_bytes(url, f"[\n{lines}\n]\n".encode())
