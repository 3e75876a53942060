"""Open Images as it is downloaded: a folder of <ImageID>.jpg, and labels in CSV files.

The labels that people verified say of an image and a class whether it is there (Confidence 1) or
not (0); only the first become labels. Labels are called by their LabelName (/m/0pc9), or with the
class descriptions by both: "/m/0pc9 Alphorn", as two classes may have one description.
"""

from __future__ import annotations

import csv
import logging
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from pathlib import Path, PurePosixPath
from sys import intern
from typing import Any

import pyarrow as pa
import pyarrow.csv

from datapipe.errors import PackingError
from datapipe.label_map import require_known
from datapipe.sources import Listing, list_files

logger = logging.getLogger(__name__)

COLUMN_TYPES = {"ImageID": pa.string(), "LabelName": pa.string(), "Confidence": pa.float64()}
DESCRIPTION_HEADER = ["LabelName", "DisplayName"]
"""Newer files have one, older ones do not."""


def list_open_images(source: Path, *, image_labels: Path, descriptions: Path | None) -> Listing:
    """The images that people found something in, sorted by name.

    Images without such a label are left out, as what is on them is not known. Errors:
    `PackingError` for files of another form, an image that is there twice, or a label without
    description.
    """
    if not source.is_dir():
        raise PackingError(f"{source}: is no folder; expected a folder of <ImageID>.jpg")
    listing = list_files(source, lambda _: (), expected="<ImageID>.jpg")
    place_of: dict[str, str] = {}
    for image in listing.images:
        image_id = _image_id(image.name)
        if image_id in place_of:
            raise PackingError(
                f"{source}: image {image_id} is there as {place_of[image_id]} and as {image.name}; "
                "leave one in"
            )
        place_of[image_id] = image.name
    labels = read_image_labels(image_labels, place_of.keys())
    if descriptions is not None:
        labels = _described(labels, read_descriptions(descriptions), str(descriptions))
    labelled = [
        replace(image, labels=labels[image_id])
        for image in listing.images
        if (image_id := _image_id(image.name)) in labels
    ]
    if not labelled:
        raise PackingError(f"{image_labels}: says of no image in {source} what is on it")
    if len(labelled) < len(listing.images):
        listing.left_out["without a verified label"] = len(listing.images) - len(labelled)
    return Listing(labelled, listing.left_out)


def read_image_labels(path: Path, image_ids: Collection[str]) -> dict[str, tuple[str, ...]]:
    """The LabelNames that were verified to be on each of these images, where there is any.

    Raises `PackingError` for a file that is not of labels that people verified.
    """
    found: defaultdict[str, set[str]] = defaultdict(set)
    absent = set()
    for image_id, label in _positive_rows(path):
        if image_id in image_ids:
            found[image_id].add(intern(label))
        else:
            absent.add(image_id)
    if absent:
        logger.warning("labelled images are not in the folder images=%d file=%s", len(absent), path)
    return {image_id: tuple(sorted(labels)) for image_id, labels in found.items()}


def read_descriptions(path: Path) -> dict[str, str]:
    """From LabelName to description. Raises `PackingError`."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = [row for row in csv.reader(file) if row and row != DESCRIPTION_HEADER]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise PackingError(f"{path}: cannot be read: {error}") from error
    bad = next((row for row in rows if len(row) != len(DESCRIPTION_HEADER)), None)
    if bad is not None:
        raise PackingError(f"{path}: {','.join(bad)!r} is no line of LabelName,DisplayName")
    return {row[0]: row[1] for row in rows}


def _positive_rows(path: Path) -> Iterator[tuple[str, str]]:
    """ImageID and LabelName of the rows with Confidence 1, a block of rows at a time."""
    options = pyarrow.csv.ConvertOptions(
        column_types=COLUMN_TYPES, include_columns=list(COLUMN_TYPES)
    )
    try:
        with pyarrow.csv.open_csv(path, convert_options=options) as reader:
            for batch in reader:
                yield from _positive(path, batch)
    except (OSError, KeyError, pa.ArrowException) as error:
        raise PackingError(
            f"{path}: cannot be read: {error}; expected the columns ImageID,Source,LabelName,"
            "Confidence"
        ) from error


def _positive(path: Path, batch: Any) -> Iterator[tuple[str, str]]:
    confidences = batch.column("Confidence").to_numpy(zero_copy_only=False)
    is_positive = confidences == 1
    is_other = ~is_positive & (confidences != 0)
    if is_other.any():
        raise PackingError(
            f"{path}: holds a Confidence of {confidences[is_other][0]:g}, so these labels are a "
            "machine's; give the file of human-verified image labels, where it is 0 or 1"
        )
    rows = batch.filter(pa.array(is_positive))
    yield from zip(
        rows.column("ImageID").to_pylist(), rows.column("LabelName").to_pylist(), strict=True
    )


def _described(
    labels: Mapping[str, tuple[str, ...]], descriptions: Mapping[str, str], where: str
) -> dict[str, tuple[str, ...]]:
    require_known({name for names in labels.values() for name in names}, descriptions, where)
    named = {label: intern(f"{label} {text}") for label, text in descriptions.items()}
    return {image_id: tuple(named[name] for name in names) for image_id, names in labels.items()}


def _image_id(name: str) -> str:
    return PurePosixPath(name).stem
