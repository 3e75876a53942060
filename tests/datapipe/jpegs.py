"""JPEGs of many kinds, and damaged ones, for the tests of the decoders."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from io import BytesIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Kind:
    """How a JPEG is written: Pillow's mode and arguments."""

    name: str
    mode: str = "RGB"
    subsampling: int = 0
    progressive: bool = False
    restart_marker_blocks: int = 0
    restart_marker_rows: int = 0


KINDS = (
    Kind("444"),
    Kind("422", subsampling=1),
    Kind("420", subsampling=2),
    Kind("grey", mode="L"),
    Kind("cmyk", mode="CMYK"),
    Kind("progressive", subsampling=2, progressive=True),
    Kind("420 with markers in rows", subsampling=2, restart_marker_blocks=2),
    Kind("420 with a marker a row", subsampling=2, restart_marker_rows=1),
    Kind("444 with a marker in two rows", restart_marker_rows=2),
    Kind("420 with markers across rows", subsampling=2, restart_marker_blocks=5),
    Kind("grey with markers in rows", mode="L", restart_marker_blocks=3),
)


def noisy(width: int, height: int, *, seed: int = 0) -> Image.Image:
    """Slopes and noise: every pixel and every block differ."""
    rng = np.random.default_rng(seed)
    ramp = np.add.outer(np.arange(height) * 3, np.arange(width) * 2)
    channels = np.stack([ramp % 190, (2 * ramp) % 190, ramp[::-1] % 190], axis=2)
    return Image.fromarray((channels + rng.integers(0, 60, channels.shape)).astype(np.uint8))


def jpeg(kind: Kind, width: int, height: int, *, quality: int = 75, seed: int = 0) -> bytes:
    buffer = BytesIO()
    noisy(width, height, seed=seed).convert(kind.mode).save(
        buffer,
        "JPEG",
        quality=quality,
        subsampling=kind.subsampling,
        progressive=kind.progressive,
        restart_marker_blocks=kind.restart_marker_blocks,
        restart_marker_rows=kind.restart_marker_rows,
    )
    return buffer.getvalue()


def scaled_by_pillow(payload: bytes, box: Box, side: int) -> NDArray[np.uint8]:
    with Image.open(BytesIO(payload)) as image:
        rgb = image.convert("RGB")
    return np.asarray(rgb.resize((side, side), Image.Resampling.BILINEAR, box=box))


def goes_along_rows_first(width: int, height: int, side: int) -> bool:
    """Whether Pillow scales along rows first, as the kernels do. Tall images it begins with columns
    (since version 12 or so): the 8-bit numbers in between differ, and the result by 1 at most.
    """
    return height <= max(side, 2 * width - side)


def with_size(payload: bytes, width: int, height: int) -> bytes:
    """The same JPEG, whose header says another size."""
    place = next(payload.index(start) for start in (b"\xff\xc0", b"\xff\xc2") if start in payload)
    return payload[: place + 5] + struct.pack(">HH", height, width) + payload[place + 9 :]


def with_many_scans(num_more: int) -> bytes:
    """A sound progressive JPEG in which one scan of fine detail follows many times more."""
    payload = jpeg(Kind("", progressive=True), 16, 16)
    scans = payload.split(b"\xff\xda")
    number = next(i for i, scan in enumerate(scans) if i and scan[2] == 1 and scan[5] > 0)
    tables = scans[number - 1][scans[number - 1].index(b"\xff\xc4") :]
    again = bytearray(scans[number].partition(b"\xff\xc4")[0])
    again[7] = 0  # at full precision, as the whole image is by then
    return payload[:-2] + tables + num_more * (b"\xff\xda" + again) + b"\xff\xd9"
