"""Decoding of JPEGs where the native kernel is missing: simplejpeg, then torch for the scaling.

All of an image is decoded, or the segments between restart markers that the box needs. The pixels
are scaled along rows, then along columns. What simplejpeg does not take (CMYK, rare samplings of
the colours) goes to Pillow, which finds files that are cut short, but not every other damage.
"""

from __future__ import annotations

import numpy as np
import simplejpeg
from numpy.typing import NDArray

from datapipe import with_pillow
from datapipe.errors import DecodeError
from datapipe.kernel import LARGEST_IMAGE_PIXELS, Box, Payload
from datapipe.segments import Region, cut, markers

Pixels = NDArray[np.int32]
"""(H, W): pixels of four bytes, the first three RGB."""

MOST_SCANS = 200
START_OF_SCAN = 0xDA
JFIF, ICC_PROFILE, ADOBE = 0xE0, 0xE2, 0xEE
HARMLESS = "extraneous bytes before marker 0xd9"
"""libjpeg's warning of bytes too many at the end, when all of the image is there."""
HARMLESS_NOTES = ("unknown JFIF revision", "Adobe color transform", "bad ICC marker")
"""libjpeg's warnings of headers that say nothing of the pixels; simplejpeg makes errors of them."""
UNKNOWN_SAMPLING = "Could not determine subsampling level"
"""Of a file that libjpeg decodes, and simplejpeg's interface to it has no name for."""


def decode_into(payload: Payload, box: Box, flip: bool, out: NDArray[np.uint8]) -> None:
    """As `datapipe.decode.decode_into`; the payload is a JPEG. Raises `DecodeError`."""
    # Here, as it takes torch, which a process that only checks images can do without.
    from datapipe.antialiasing import filters, transposed

    opened = _opened(payload)
    if opened is None:
        with_pillow.decode_into(payload, box, flip, out)
        return
    content, size = opened
    columns, rows = filters(size, _edges(box, size), side=out.shape[0])
    needed = Region(columns.start, rows.start, columns.stop, rows.stop)
    pixels = _part(content, needed)
    if pixels is None:
        with_pillow.decode_into(payload, box, flip, out)
        return
    scaled = rows.apply(transposed(columns.apply(transposed(pixels))))
    colours = scaled.view(np.uint8).reshape(*scaled.shape, 4)
    for channel in range(3):  # three times as fast as all at once
        colour = colours[:, :, channel]
        out[:, :, channel] = colour[:, ::-1] if flip else colour


def check_decodes(payload: Payload) -> None:
    """Decode all of a JPEG and drop the result. Raises `DecodeError`."""
    opened = _opened(payload)
    if opened is None or _pixels(opened[0]) is None:
        with_pillow.check_decodes(payload)


def _opened(payload: Payload) -> tuple[bytes, tuple[int, int]] | None:
    """A file that simplejpeg takes, with the same image of (width, height); None: it takes none."""
    content = bytes(payload)
    _check_scans(content)
    try:
        return content, _size(content)
    except DecodeError as error:
        if UNKNOWN_SAMPLING in str(error):
            return None
        if not any(note in str(error) for note in HARMLESS_NOTES):
            raise
    content = _with_plain_notes(content)
    return content, _size(content)


def _with_plain_notes(content: bytes) -> bytes:
    """No colour profile; JFIF of version 1; of Adobe's transforms the one that libjpeg assumes."""
    result, end = bytearray(content[:2]), 2
    for marker, start, end in markers(content):
        segment = bytearray(content[start:end])
        if marker == JFIF and segment[4:9] == b"JFIF\0" and len(segment) > 9:
            segment[9] = 1
        if marker == ADOBE and segment[4:9] == b"Adobe" and len(segment) >= 16:
            segment[15] = min(segment[15], 1)
        if marker != ICC_PROFILE:
            result += segment
        if marker == START_OF_SCAN:
            break
    return bytes(result) + content[end:]


def _edges(box: Box, size: tuple[int, int]) -> NDArray[np.float32]:
    """(2, 2): start and stop by axis."""
    edges = np.asarray(box, np.float32).reshape(2, 2).T
    start, stop = edges[:, 0], edges[:, 1]
    if not ((start >= 0) & (start <= stop) & (stop <= size)).all():
        raise DecodeError(f"the box is not inside the image: {box} of {size[0]} x {size[1]} pixels")
    return edges


def _size(content: bytes) -> tuple[int, int]:
    """(width, height) of an image that keeps the limits."""
    try:
        height, width, _, _ = simplejpeg.decode_jpeg_header(content)
    except ValueError as error:
        raise DecodeError(f"not a usable JPEG: {error}") from error
    if width * height > LARGEST_IMAGE_PIXELS:
        raise DecodeError(
            f"{width} x {height} pixels; allowed: {LARGEST_IMAGE_PIXELS // 1_000_000} megapixels"
        )
    return width, height


def _check_scans(content: bytes) -> None:
    values = np.frombuffer(content, np.uint8)  # a fifth of the time of content.count
    num_scans = np.count_nonzero((values[:-1] == 0xFF) & (values[1:] == START_OF_SCAN))
    if num_scans > MOST_SCANS:
        raise DecodeError(f"{num_scans} scans are more than any encoder makes")


def _part(content: bytes, needed: Region) -> Pixels | None:
    """A region of the image, from the segments that it covers where there are any."""
    found = cut(content, needed)
    try:
        part, held = found or (content, Region(0, 0, 0, 0))
        pixels = _pixels(part)
    except DecodeError:
        if not found:
            raise
        pixels, held = _pixels(content), Region(0, 0, 0, 0)
    if pixels is None:
        return None
    return pixels[
        needed.top - held.top : needed.bottom - held.top,
        needed.left - held.left : needed.right - held.left,
    ]


def _pixels(content: bytes) -> Pixels | None:
    """All of the image; None for what is left to Pillow."""
    try:
        _, _, colours, _ = simplejpeg.decode_jpeg_header(content)
        if colours in ("CMYK", "YCCK"):
            return None
        pixels: NDArray[np.uint8] = simplejpeg.decode_jpeg(content, "RGBX")
    except ValueError as error:
        if HARMLESS in str(error):
            return None
        raise DecodeError(f"truncated or corrupt: {error}") from error
    return pixels.view(np.int32)[:, :, 0]
