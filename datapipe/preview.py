"""A contact sheet: some images of a data set, drawn at random, with their labels underneath."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from datapipe.decode import DecodeError, decode_into, image_size
from datapipe.errors import MissingShard
from datapipe.index import ShardIndex
from datapipe.safe_text import printable, shortened
from datapipe.storage import read_range
from datapipe.table import LARGEST_LABEL, ShardTable, crc32_of

SIDE = 192
"""Of a picture, pixels."""
MARGIN = 8
LINE_HEIGHT = 15
NUM_LINES = 3
FONT_SIZE = 12
BACKGROUND, TEXT, FAULT = "white", "black", "#b00020"


@dataclass(frozen=True, eq=False)
class Cell:
    """A picture (SIDE, SIDE, 3) uint8, or why there is none, and the lines under it."""

    picture: NDArray[np.uint8] | None
    fault: str
    lines: Sequence[str]


def contact_sheet(
    index: ShardIndex, names: Mapping[int, str], *, num_images: int, seed: int
) -> bytes:
    """A PNG of `num_images` samples, all if there are fewer; the middle square of each image.

    names: of the labels. A sample that cannot be used is shown as such. Errors: `MissingShard`,
    `BadIndex`, `UnreadableUrl`.
    """
    num_images = min(num_images, index.num_samples)
    ids = np.random.default_rng(seed).choice(index.num_samples, num_images, replace=False)
    shards, rows = index.locate(ids)
    cells = [
        _cell(index, shard, row, names)
        for shard, row in zip(shards.tolist(), rows.tolist(), strict=True)
    ]
    return drawn(cells)


def _cell(index: ShardIndex, shard: int, row: int, names: Mapping[int, str]) -> Cell:
    table = index.table(shard)
    offset, size = int(table.offsets[row]), int(table.sizes[row])
    try:
        payload = read_range(index.shard_url(shard), offset, offset + size)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise MissingShard((index.shard_url(shard),)) from error
    lines = [*_label_lines(table, row, names)][: NUM_LINES - 1]
    lines = [f"{index.shards[shard].shard} {table.key(row)}", *lines]
    try:
        return Cell(_picture(payload, size, table.known_crc32(row)), "", lines)
    except DecodeError as error:
        return Cell(None, str(error), lines)


def _picture(payload: bytes, size: int, crc32: int | None) -> NDArray[np.uint8]:
    """The middle square of an image. Raises `DecodeError`."""
    if len(payload) < size:
        raise DecodeError("the shard ends before this sample does")
    if crc32 is not None and crc32_of(payload) != crc32:
        raise DecodeError("its bytes are not those that were indexed (crc32 differs)")
    width, height = image_size(payload)
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    picture = np.empty((SIDE, SIDE, 3), np.uint8)
    decode_into(payload, (left, top, left + side, top + side), False, picture)
    return picture


def _label_lines(table: ShardTable, row: int, names: Mapping[int, str]) -> list[str]:
    labels = table.labels(row)
    if labels is None:
        return [f"no usable label (0 to {LARGEST_LABEL:,})"]
    return [f"{label} {names.get(label, '')}".rstrip() for label in labels.tolist()] or ["no label"]


def drawn(cells: Sequence[Cell]) -> bytes:
    """A PNG of them, in rows and columns."""
    num_columns = max(1, round(len(cells) ** 0.5))
    num_rows = -(-len(cells) // num_columns)
    width, height = SIDE + MARGIN, SIDE + MARGIN + NUM_LINES * LINE_HEIGHT
    size = (num_columns * width + MARGIN, num_rows * height + MARGIN)
    sheet = Image.new("RGB", size, BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(FONT_SIZE)
    for number, cell in enumerate(cells):
        left = MARGIN + number % num_columns * width
        top = MARGIN + number // num_columns * height
        if cell.picture is None:
            draw.rectangle((left, top, left + SIDE - 1, top + SIDE - 1), outline=FAULT)
            for line, text in enumerate(_wrapped(cell.fault)):
                draw.text((left + 4, top + 4 + line * LINE_HEIGHT), text, FAULT, font)
        else:
            sheet.paste(Image.fromarray(cell.picture), (left, top))
        for line, text in enumerate(cell.lines):
            place = (left, top + SIDE + 2 + line * LINE_HEIGHT)
            draw.text(place, _fitting(text, font), TEXT, font)
    buffer = BytesIO()
    sheet.save(buffer, "PNG")
    return buffer.getvalue()


def _wrapped(text: str) -> list[str]:
    """Lines that fit into a picture's place."""
    text, width = printable(text), SIDE // 7
    return [text[start : start + width] for start in range(0, len(text), width)][:NUM_LINES]


def _fitting(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """As much of a line as there is room for: what lies beyond would run into the next picture."""
    text = shortened(printable(text), SIDE)
    while font.getlength(text) > SIDE:
        text = shortened(text, len(text) - 1)
    return text
