"""What a checkpoint says of images: its labels with the highest scores.

python jobs/predict.py ~/xdist-runs/imagenet_sync-1a2b3c4d/best photo.jpg holiday/
python jobs/predict.py s3://bucket/run/checkpoints/step-000000001000 s3://bucket/photos/ \\
    --output predictions.parquet --sheet sheet.png
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tyro
from PIL import Image
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from datapipe.errors import DataError
from datapipe.labels import read_labels
from datapipe.loose_images import loose_images
from datapipe.preview import SIDE, Cell, drawn
from datapipe.safe_text import printable
from datapipe.storage import absolute, replacing, write_bytes
from xdist import checkpoint
from xdist.errors import XdistError
from xdist.label_space import labels_at
from xdist.prediction import Prediction, Predictor
from xdist.state import WeightsName, averages
from xdist.stored_config import stored_config

logger = logging.getLogger(__name__)

DESCRIPTION = "What a checkpoint says of images: its labels with the highest scores."
MOST_IN_SHEET = 100
OUTPUTS = (".jsonl", ".parquet")
ROWS_AT_ONCE = 1024

Row = dict[str, Any]
SCHEMA = pa.schema(
    [
        ("image", pa.string()),
        ("labels", pa.list_(pa.string())),
        ("ids", pa.list_(pa.int64())),
        ("scores", pa.list_(pa.float32())),
        ("error", pa.string()),
    ]
)


@dataclass(frozen=True)
class Arguments:
    """The command line."""

    source: tyro.conf.Positional[str]
    """A run directory, whose newest checkpoint is taken, RUN/best, or one checkpoint; a path or a
    URL."""
    images: tyro.conf.Positional[tuple[str, ...]]
    """Images, folders of images, tars and folders of shards; paths or URLs."""
    top_k: int = 5
    """Labels of an image that are told."""
    weights: WeightsName | None = None
    """The Polyak average or the raw weights; None is the average where the run keeps one."""
    labels: str | None = None
    """labels.json of the training set; None is the one beside its shards."""
    batch_size: int = 32
    """Images that are computed together."""
    output: str | None = None
    """A .jsonl or .parquet file, or its URL, that is written in the place of the table."""
    sheet: str | None = None
    """A .png file, or its URL: a contact sheet of the first hundred images, as the network sees
    them."""

    def __post_init__(self) -> None:
        for name in ("top_k", "batch_size"):
            if (value := getattr(self, name)) < 1:
                option = name.replace("_", "-")
                raise ValueError(f"--{option} is {value}; allowed: at least 1")
        if not self.images:
            raise ValueError("no images; give files, folders or URLs after the checkpoint")
        if self.output is not None and not self.output.endswith(OUTPUTS):
            raise ValueError(f"--output is {self.output}; allowed endings: {', '.join(OUTPUTS)}")
        if self.sheet is not None and not self.sheet.endswith(".png"):
            raise ValueError(f"--sheet is {self.sheet}; allowed ending: .png")


class Names:
    """Of labels, where they are known."""

    def __init__(self, url: str | None, train: str) -> None:
        labels = read_labels(absolute(url)) if url is not None else _labels_beside(train)
        self._names = {label.id: label.name for label in labels}

    def __getitem__(self, label: int) -> str:
        return self._names.get(label, str(label))


def _labels_beside(train: str) -> Sequence[Any]:
    try:
        labels = labels_at(train)
    except DataError as error:
        logger.warning("labels have numbers instead of names: %s", error)
        return ()
    if not labels:
        logger.warning("labels have numbers instead of names: no labels.json at %s", train)
    return labels


def run(arguments: Arguments, console: Console) -> int:
    """Predict, and tell; how many images could not be used."""
    found, _ = checkpoint.find(absolute(arguments.source))
    config = stored_config(found)
    weights: WeightsName = "average" if averages(config.optimizer) else "raw"
    predictor = Predictor(found, config, arguments.weights or weights, top_k=arguments.top_k)
    names = Names(arguments.labels, config.data.train)
    places = [loose_images(place) for place in arguments.images]  # Each is looked at now.
    images = chain.from_iterable(places)
    predictions = predictor.predict(images, batch_size=arguments.batch_size)
    cells: list[Cell] = []
    num_failed = 0
    with _told(arguments.output, console) as tell:
        for prediction in predictions:
            row = row_of(prediction, names)
            tell(row)
            num_failed += prediction.error is not None
            if arguments.sheet is not None and len(cells) < MOST_IN_SHEET:
                cells.append(_cell(prediction, row))
    if arguments.sheet is not None:
        write_bytes(absolute(arguments.sheet), drawn(cells))
    return num_failed


def row_of(prediction: Prediction, names: Names) -> Row:
    """What is told of an image."""
    return {
        "image": prediction.image.name,
        "labels": [names[guess.label] for guess in prediction.guesses],
        "ids": [guess.label for guess in prediction.guesses],
        "scores": [guess.score for guess in prediction.guesses],
        "error": prediction.error,
    }


@contextmanager
def _told(output: str | None, console: Console) -> Iterator[Callable[[Row], None]]:
    """Takes rows, and has told all of them at the end of the block."""
    if output is None:
        table = Table(Column("image", overflow="fold"), Column("labels", no_wrap=True))
        yield lambda row: table.add_row(
            *(Text(text) for text in (printable(row["image"]), _text(row)))
        )
        console.print(table)
    elif output.endswith(".jsonl"):
        with replacing(absolute(output)) as file:
            yield lambda row: _write_line(file, row)
    else:
        with replacing(absolute(output)) as file, pq.ParquetWriter(file, SCHEMA) as writer:
            rows: list[Row] = []
            yield lambda row: _write_rows(writer, rows, row)
            writer.write_table(pa.Table.from_pylist(rows, SCHEMA))


def _cell(prediction: Prediction, row: Row) -> Cell:
    if prediction.pixels is None:
        return Cell(None, str(prediction.error), [])
    picture = Image.fromarray(prediction.pixels).resize((SIDE, SIDE))
    return Cell(np.asarray(picture), "", _lines(row))


def _write_line(file: IO[bytes], row: Row) -> None:
    file.write(json.dumps(row).encode() + b"\n")


def _write_rows(writer: Any, rows: list[Row], row: Row) -> None:
    """Many rows at once."""
    rows.append(row)
    if len(rows) == ROWS_AT_ONCE:
        writer.write_table(pa.Table.from_pylist(rows, SCHEMA))
        rows.clear()


def _text(row: Row) -> str:
    return "\n".join(_lines(row))


def _lines(row: Row) -> list[str]:
    """What is said of an image, for people."""
    if row["error"] is not None:
        return [printable(row["error"])]
    guesses = zip(row["labels"], row["scores"], strict=True)
    return [f"{score:.3f} {printable(label)}" for label, score in guesses]


def main(arguments: list[str] | None = None) -> int:
    """0; 1 where some images could not be used; 2 with one line on stderr for what the user can
    mend.
    """
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    try:
        given = tyro.cli(Arguments, args=arguments, description=DESCRIPTION)
        num_failed = run(given, Console())
    except (DataError, XdistError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    if num_failed:
        print(f"{num_failed} images could not be used", file=sys.stderr)
    return int(bool(num_failed))


if __name__ == "__main__":
    sys.exit(main())
