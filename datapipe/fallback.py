"""Decoding of JPEGs where the native kernel is missing: simplejpeg, then torch for the scaling.

All of an image is decoded. The pixels that the box needs are scaled along rows, then along columns:
weighted sums of a matrix' rows (`embedding_bag`), rounded to 8 bits in between as Pillow does.
"""

from __future__ import annotations

import numpy as np
import simplejpeg
from numpy.typing import NDArray

from datapipe import with_pillow
from datapipe.errors import DecodeError
from datapipe.kernel import LARGEST_IMAGE_PIXELS, Box, Payload

Pixels = NDArray[np.int32]
"""(H, W): pixels of four bytes, the first three RGB."""

MOST_SCANS = 200
START_OF_SCAN = b"\xff\xda"
HARMLESS = "extraneous bytes before marker 0xd9"
"""libjpeg's warning of bytes too many at the end, when all of the image is there."""


def decode_into(payload: Payload, box: Box, flip: bool, out: NDArray[np.uint8]) -> None:
    """As `datapipe.decode.decode_into`; the payload is a JPEG. Raises `DecodeError`."""
    # Here, as it takes torch, which a process that only checks images can do without.
    from datapipe.antialiasing import Filter, transposed

    pixels = _pixels(bytes(payload))
    if pixels is None:
        with_pillow.decode_into(payload, box, flip, out)
        return
    height, width = pixels.shape
    left, top, right, bottom = np.asarray(box, np.float32).tolist()
    if not (0 <= left <= right <= width and 0 <= top <= bottom <= height):
        raise DecodeError(f"the box is not inside the image: {box} of {width} x {height} pixels")
    columns = Filter(width, left, right, out.shape[1])
    rows = Filter(height, top, bottom, out.shape[0])
    needed = pixels[rows.start : rows.stop, columns.start : columns.stop]
    scaled = rows.apply(transposed(columns.apply(transposed(needed))))
    colours = scaled.view(np.uint8).reshape(*scaled.shape, 4)
    for channel in range(3):  # three times as fast as all at once
        colour = colours[:, :, channel]
        out[:, :, channel] = colour[:, ::-1] if flip else colour


def check_decodes(payload: Payload) -> None:
    """Decode all of a JPEG and drop the result. Raises `DecodeError`."""
    if _pixels(bytes(payload)) is None:
        with_pillow.check_decodes(payload)


def _pixels(content: bytes) -> Pixels | None:
    """All of the image; None for what is left to Pillow."""
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(content)
        _check_limits(content, width, height)
        if colours in ("CMYK", "YCCK"):
            return None
        pixels: NDArray[np.uint8] = simplejpeg.decode_jpeg(content, "RGBX")
    except ValueError as error:
        if isinstance(error, DecodeError):
            raise
        if HARMLESS in str(error):
            return None
        raise DecodeError(f"truncated or corrupt: {error}") from error
    return pixels.view(np.int32)[:, :, 0]


def _check_limits(content: bytes, width: int, height: int) -> None:
    if width * height > LARGEST_IMAGE_PIXELS:
        raise DecodeError(
            f"{width} x {height} pixels; allowed: {LARGEST_IMAGE_PIXELS // 1_000_000} megapixels"
        )
    num_scans = content.count(START_OF_SCAN)
    if num_scans > MOST_SCANS:
        raise DecodeError(f"{num_scans} scans are more than any encoder makes")
