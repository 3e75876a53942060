"""The size of an image by its first bytes: JPEG, PNG, WebP.

`native/tar_walk.c` holds the same rules, and gives the same answers.
"""

from __future__ import annotations

from collections.abc import Callable

SMALLEST_FILE = 32
"""Bytes; no image is smaller."""
MOST_SEGMENTS = 4096
"""Before a JPEG's frame header, fill bytes counted as well: beyond is no picture but an attack."""
LARGEST_SIDE = (1 << 31) - 1

Size = tuple[int, int]
ReadAt = Callable[[int, int], bytes]
"""(offset, count) -> so many bytes of the file; fewer where it ends before."""


def header_size(read_at: ReadAt) -> Size | None:
    """(width, height) as the header says; (0, 0) for what is no image that anybody would want.

    None: these few rules do not tell, and a decoder has to.
    """
    start = read_at(0, SMALLEST_FILE)
    if len(start) < SMALLEST_FILE:
        return None
    if start.startswith(b"\xff\xd8"):
        return _jpeg_size(read_at)
    if start.startswith(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"):
        return _checked(int.from_bytes(start[16:20], "big"), int.from_bytes(start[20:24], "big"))
    if start.startswith(b"RIFF") and start[8:12] == b"WEBP":
        return _webp_size(start)
    return None


def has_restart_markers(start: bytes) -> bool:
    """Whether a JPEG of these first bytes has a restart interval, as far as they go."""
    place = 2
    while start.startswith(b"\xff\xd8") and start[place : place + 1] == b"\xff":
        marker, length = start[place + 1 : place + 2], start[place + 2 : place + 4]
        if marker in (b"", b"\xda"):
            return False
        if marker == b"\xdd":
            return start[place + 4 : place + 6] not in (b"", b"\0\0")
        place += 1 if marker == b"\xff" else 2 + int.from_bytes(length, "big")
    return False


def _jpeg_size(read_at: ReadAt) -> Size | None:
    """From the frame header, which comes after segments of known lengths."""
    place = 2
    for _ in range(MOST_SEGMENTS):
        head = read_at(place, 4)
        if len(head) < 4 or head[0] != 0xFF:
            return None
        marker, length = head[1], int.from_bytes(head[2:], "big")
        if marker == 0xFF:
            place += 1
            continue
        if marker < 0xC0 or 0xD0 <= marker <= 0xDA or length < 2:
            return None
        if marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            frame = read_at(place, 10)
            if len(frame) < 10 or frame[4] != 8:
                return None
            return _checked(int.from_bytes(frame[7:9], "big"), int.from_bytes(frame[5:7], "big"))
        place += 2 + length
    return 0, 0


def _webp_size(start: bytes) -> Size | None:
    """From the first chunk: lossy, lossless, or the canvas of an extended file."""
    kind = start[12:16]
    if kind == b"VP8 " and start[23:26] == b"\x9d\x01\x2a":
        width, height = (int.from_bytes(start[place : place + 2], "little") for place in (26, 28))
        return _checked(width & 0x3FFF, height & 0x3FFF)
    if kind == b"VP8L" and start[20] == 0x2F:
        bits = int.from_bytes(start[21:25], "little")
        return _checked((bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1)
    if kind == b"VP8X":
        width, height = (int.from_bytes(start[place : place + 3], "little") for place in (24, 27))
        return _checked(width + 1, height + 1)
    return None


def _checked(width: int, height: int) -> Size | None:
    return (width, height) if 1 <= width <= LARGEST_SIDE and 1 <= height <= LARGEST_SIDE else None
