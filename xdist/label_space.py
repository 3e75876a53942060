"""What an evaluation counts: which outputs of the model are scored, what the labels of the
evaluation set mean there, and how much a class weighs.

An evaluation set may know fewer labels than the model, or others. Scored is the intersection: an
output outside of it takes no place among an image's highest, and a label outside of it is left out
and counted.
"""

from __future__ import annotations

import csv
import io
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from datapipe.errors import DataError
from datapipe.json_text import parse_json
from datapipe.labels import LABELS_NAME, Label, read_labels
from datapipe.storage import absolute, directory_of, exists, join, read_bytes
from xdist.errors import UserError

logger = logging.getLogger(__name__)

NUM_NAMED = 5
"""Labels that a message names, of those it is about."""


@dataclass(frozen=True, eq=False)
class LabelSpace:
    """The outputs of the model that are scored; a *column* is the place of an output among them."""

    outputs: NDArray[np.int64]
    """(C,), ascending."""
    columns: NDArray[np.int64]
    """(L,): the column of every label id of the evaluation set; -1 is outside."""

    @property
    def num_labels(self) -> int:
        """Label ids that the evaluation set may have."""
        return len(self.columns)

    def restrict(
        self, logits: Tensor, label_ids: Tensor, label_offsets: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Logits (N, C) of the outputs that are scored, the labels among them in CSR form, and
        whether each of the labels that came in is among them: (nnz,), bool.
        """
        device = logits.device
        columns = torch.tensor(self.columns, device=device)[label_ids]
        is_inside = columns >= 0
        kept = torch.nn.functional.pad(is_inside.cumsum(0), (1, 0))
        outputs = torch.tensor(self.outputs, device=device)
        return logits[:, outputs], columns[is_inside], kept[label_offsets], is_inside


@dataclass(frozen=True, eq=False)
class ClassWeights:
    """The weight of every output of the model, (num_classes,), and whether it is scored at all."""

    weights: NDArray[np.float64]
    is_listed: NDArray[np.bool_]


def label_space(
    weights: ClassWeights,
    *,
    num_labels: int,
    model_labels: Sequence[Label],
    evaluation_labels: Sequence[Label],
) -> LabelSpace:
    """The intersection of what the model knows, what the evaluation set knows, and what has a
    weight.

    Where both have names, a label is its name; otherwise its id. `num_labels`: label ids that occur
    in the evaluation set. Raises `UserError` when nothing is left.
    """
    num_classes = len(weights.is_listed)
    outputs = _outputs_of_labels(num_classes, num_labels, model_labels, evaluation_labels)
    is_scored = weights.is_listed.copy()
    if evaluation_labels:
        is_known = np.zeros(num_classes, np.bool_)
        is_known[outputs[outputs >= 0]] = True
        is_scored &= is_known
    scored = np.flatnonzero(is_scored)
    if not scored.size:
        raise UserError(
            f"nothing to score: none of the {num_classes} outputs of the model is a label of both "
            "the evaluation set and the class weights"
        )
    column_of_output = np.full(num_classes, -1, np.int64)
    column_of_output[scored] = np.arange(len(scored))
    columns = np.where(outputs >= 0, column_of_output[outputs], -1)
    return LabelSpace(scored, columns)


def _outputs_of_labels(
    num_classes: int,
    num_labels: int,
    model_labels: Sequence[Label],
    evaluation_labels: Sequence[Label],
) -> NDArray[np.int64]:
    """The model's output for every label id of the evaluation set, -1 where there is none."""
    ids = np.arange(max(num_labels, len(evaluation_labels)), dtype=np.int64)
    if not (model_labels and evaluation_labels):
        return np.where(ids < num_classes, ids, -1)
    output_of_name = {label.name: label.id for label in model_labels if label.id < num_classes}
    found = [output_of_name.get(label.name, -1) for label in evaluation_labels]
    unknown = [label.name for label in evaluation_labels if label.name not in output_of_name]
    if unknown:
        logger.warning(
            "%d of %d labels of the evaluation set are none of the model's and are left out: %s",
            len(unknown),
            len(evaluation_labels),
            _named(unknown),
        )
    return np.array(found + [-1] * (len(ids) - len(found)), np.int64)


def weights_of_frequencies(frequencies: Sequence[float], *, num_classes: int) -> ClassWeights:
    """The labels' weights, by id; outputs beyond the labels weigh nothing."""
    weights = np.zeros(num_classes)
    weights[: len(frequencies)] = frequencies
    return ClassWeights(weights, np.ones(num_classes, np.bool_))


def read_class_weights(url: str, labels: Sequence[Label], *, num_classes: int) -> ClassWeights:
    """The weights of a file, by the names of the model's labels, or by id where a name is none of
    them. What the file does not list is not scored.

    A CSV file begins with the line `label,weight`; a JSON file is an object, or a labels.json.
    Raises `UserError`, or `BadLabels` for such a file.
    """
    outputs = {label.name: label.id for label in labels if label.id < num_classes}
    weights, is_listed = np.zeros(num_classes), np.zeros(num_classes, np.bool_)
    unknown = []
    for name, weight in _entries(url):
        output = outputs.get(name, _as_id(name))
        if not 0 <= output < num_classes:
            unknown.append(name)
            continue
        if is_listed[output]:
            raise UserError(f"{url}: label {name!r} is listed twice; keep one")
        weights[output], is_listed[output] = _checked(url, name, weight), True
    if unknown:
        logger.warning(
            "%d labels of %s are none of the model's and are left out: %s",
            len(unknown),
            url,
            _named(unknown),
        )
    if not weights.any():
        raise UserError(
            f"{url}: none of the {num_classes} labels of the model has a weight above 0 in it"
        )
    return ClassWeights(weights, is_listed)


def _entries(url: str) -> list[tuple[str, object]]:
    """Labels, by name or id, and their weights, as the file has them."""
    try:
        text = read_bytes(url).decode()
        if not url.endswith(".json"):
            return _csv_entries(text)
        value = parse_json(text)
        if isinstance(value, Mapping):
            return list(value.items())
    except (OSError, ValueError, DataError) as error:
        raise UserError(
            f"{url}: class weights cannot be read: {error}; allowed: a .json file (an object of "
            "labels and weights, or a labels.json), or CSV with the columns label and weight"
        ) from error
    return [(label.name, label.weight) for label in read_labels(url)]


def _csv_entries(text: str) -> list[tuple[str, object]]:
    rows = csv.DictReader(io.StringIO(text), strict=True)
    columns = rows.fieldnames or ()
    if not {"label", "weight"} <= set(columns):
        raise ValueError(f"its first line is {','.join(columns)!r}")
    return [(row["label"].strip(), row["weight"]) for row in rows]


def _as_id(name: str) -> int:
    return int(name) if name.isascii() and name.isdigit() else -1


def _checked(url: str, name: str, value: object) -> float:
    try:
        weight = float(value)  # type: ignore[arg-type]  # What cannot be one raises.
    except (TypeError, ValueError):
        weight = math.nan
    if not 0 <= weight < math.inf:
        raise UserError(f"{url}: the weight of {name!r} is {value!r}; allowed: at least 0")
    return weight


def labels_at(url: str) -> tuple[Label, ...]:
    """The labels.json of a data set, whose URL may be that of its manifest; none without one."""
    directory = absolute(url)
    directory = directory_of(directory) if directory.endswith(".json") else directory
    labels_url = join(directory, LABELS_NAME)
    return read_labels(labels_url) if exists(labels_url) else ()


def _named(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - NUM_NAMED} more" if len(names) > NUM_NAMED else ""
    return ", ".join(map(repr, names[:NUM_NAMED])) + more
