"""From a JPEG with restart markers, a smaller one that holds a part of the image.

Between two markers lies a segment, which can be decoded without those before it. Where the segments
divide the rows of blocks evenly, or are whole rows, those that a region needs make a JPEG of their
own. The native kernel does the same, in native/jpeg/segments.c.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

SOF0, SOF1, SOS, DRI, APP0, APP14 = 0xC0, 0xC1, 0xDA, 0xDD, 0xE0, 0xEE
RST0, EOI = 0xD0, 0xD9
TABLES = (0xDB, 0xC4)
MARGIN = 2
"""Pixels around a region that smooth upsampling of the colours looks at, and one more."""


@dataclass(frozen=True)
class Region:
    """A part of an image in pixels, from (left, top) to before (right, bottom)."""

    left: int
    top: int
    right: int
    bottom: int


@dataclass(frozen=True)
class _Layout:
    """What the header says."""

    headers: bytes
    """Those that decoding needs, with the frame's size at `size_at`."""
    size_at: int
    scan_at: int
    width: int
    height: int
    segment_width: int
    segment_height: int

    @property
    def num_columns(self) -> int:
        return -(-self.width // self.segment_width)

    @property
    def num_rows(self) -> int:
        return -(-self.height // self.segment_height)


def cut(content: bytes, needed: Region) -> tuple[bytes, Region] | None:
    """A JPEG that holds the second result's part of the image; None where it cannot be cut, or its
    markers are not where its header says.
    """
    layout = _layout(content)
    starts = None if layout is None else _segment_starts(content, layout)
    if layout is None or starts is None:
        return None
    left = max(needed.left - MARGIN, 0) // layout.segment_width
    top = max(needed.top - MARGIN, 0) // layout.segment_height
    right = min(-(-(needed.right + MARGIN) // layout.segment_width), layout.num_columns)
    bottom = min(-(-(needed.bottom + MARGIN) // layout.segment_height), layout.num_rows)
    held = Region(
        left * layout.segment_width,
        top * layout.segment_height,
        min(right * layout.segment_width, layout.width),
        min(bottom * layout.segment_height, layout.height),
    )
    edges = starts[: layout.num_rows * layout.num_columns]
    firsts = edges.reshape(layout.num_rows, -1)[top:bottom, left]
    lasts = starts[1:].reshape(layout.num_rows, -1)[top:bottom, right - 1]
    kept = [content[first:last] for first, last in zip(firsts, lasts, strict=True)]
    size = struct.pack(">HH", held.bottom - held.top, held.right - held.left)
    result = bytearray(layout.headers + b"".join(kept))
    result[layout.size_at : layout.size_at + 4] = size
    lengths = np.diff(starts).reshape(layout.num_rows, -1)[top:bottom, left:right].ravel()
    ends = len(layout.headers) + np.cumsum(lengths)
    np.frombuffer(result, np.uint8)[ends - 1] = RST0 + np.arange(len(ends)) % 8
    result[-1] = EOI
    return bytes(result), held


def _segment_starts(content: bytes, layout: _Layout) -> NDArray[np.int64] | None:
    """Where each segment begins, and the end of the last one, its end-of-image marker included."""
    values = np.frombuffer(content, np.uint8)[layout.scan_at :]
    following = values[1:]
    markers = np.flatnonzero((values[:-1] == 0xFF) & (following != 0))
    num_segments = layout.num_rows * layout.num_columns
    expected = RST0 + np.arange(num_segments) % 8
    expected[-1] = EOI
    if len(markers) < num_segments or (following[markers[:num_segments]] != expected).any():
        return None
    return np.concatenate([[0], markers[:num_segments] + 2]) + layout.scan_at


def _layout(content: bytes) -> _Layout | None:
    headers = [content[:2]]
    frame, interval, size_at = b"", 0, 0
    for marker, start, stop in markers(content):
        segment = content[start:stop]
        if marker in (SOF0, SOF1):
            frame, size_at = segment, sum(map(len, headers)) + 5
        elif marker == DRI and len(segment) == 6:
            (interval,) = struct.unpack_from(">H", segment, 4)
        elif marker == SOS:
            headers.append(segment)
            if len(frame) < 13 or len(segment) < 5 or segment[4] != frame[9]:
                return None
            return _grid(b"".join(headers), size_at, stop, frame, interval)
        elif marker < APP0 and marker not in TABLES:
            return None
        if marker <= APP0 or marker == APP14:
            headers.append(segment)
    return None


def _grid(
    headers: bytes, size_at: int, scan_at: int, frame: bytes, interval: int
) -> _Layout | None:
    """How an interval divides the rows of MCUs, if it does."""
    height, width = struct.unpack_from(">HH", frame, 5)
    num_components = frame[9]
    factors = frame[11 : 11 + 3 * num_components : 3]
    mcu_width = 8 * (max(factor >> 4 for factor in factors) if num_components > 1 else 1)
    mcu_height = 8 * (max(factor & 15 for factor in factors) if num_components > 1 else 1)
    if not (interval and height and width and mcu_width and mcu_height):
        return None
    columns = -(-width // mcu_width)
    if columns % interval and interval % columns:
        return None
    in_row = min(interval, columns)
    return _Layout(
        headers,
        size_at,
        scan_at,
        width,
        height,
        segment_width=in_row * mcu_width,
        segment_height=max(interval // columns, 1) * mcu_height,
    )


def markers(content: bytes) -> Iterator[tuple[int, int, int]]:
    """Marker, start and stop of the segments before the scan; ends early where they are damaged."""
    at = 2
    while at + 4 <= len(content) and content[at] == 0xFF:
        (length,) = struct.unpack_from(">H", content, at + 2)
        if length < 2 or at + 2 + length > len(content):
            return
        yield content[at + 1], at, at + 2 + length
        at += 2 + length
