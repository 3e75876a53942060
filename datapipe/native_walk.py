"""The members of a plain local tar, listed by compiled code: `native/tar_walk.c` by ctypes.

It is installed beside the packages, where a compiler was present. What it does not take, and where
it is missing, `datapipe.tar_walk` reads with tarfile: the same members, some ten times slower.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from datapipe.native_library import load_library

MODULE = "datapipe_tar_walk"
ABI_VERSION = 1
MORE, END, ODD = 0, 1, 2
NUM_PIECES = 2048
KEY_BYTES = 1 << 18
CONTENT_BYTES = 1 << 22
EXTENSIONS = ("jpg", "jpeg", "png", "webp", "cls", "json", "")
"""In the order of the C code's, whose -1 is the last one."""
PIECE = np.dtype(
    [
        ("offset", np.int64),
        ("size", np.int64),
        ("width", np.int32),
        ("height", np.int32),
        ("key_start", np.int32),
        ("key_end", np.int32),
        ("label", np.int32),
        ("content_start", np.int32),
        ("content_end", np.int32),
        ("too_large", np.int32),
    ]
)

NOT_UTF8 = "backslashreplace"

Piece = tuple[str, int, int, int, int, int | None, str, bytes | None]
"""What lies together of a sample: key, the image's offset (-1: no image), size, width, height (-1:
not found) and crc32 (None: not computed), a label member's extension ("": none) and content. Of a
member that is too large: its extension, without the content.
"""


class OddArchive(Exception):
    """An archive that is not plain: damaged, cut short, or with what the C code does not know."""


def is_available() -> bool:
    return _library() is not None


def native_pieces(file_number: int, file_size: int) -> Iterator[list[Piece]]:
    """The image and label members of the tar in an open file, in their order.

    Raises `OddArchive`, perhaps after some pieces.
    """
    walk = _library()
    pieces = np.empty(NUM_PIECES, PIECE)
    keys, contents = np.empty(KEY_BYTES, np.uint8), np.empty(CONTENT_BYTES, np.uint8)
    offset, count = ctypes.c_int64(0), ctypes.c_int32(0)
    state = MORE
    while state == MORE:
        state = walk(
            file_number,
            file_size,
            ctypes.byref(offset),
            pieces.ctypes.data,
            NUM_PIECES,
            ctypes.byref(count),
            keys.ctypes.data,
            KEY_BYTES,
            contents.ctypes.data,
            CONTENT_BYTES,
        )
        yield _as_tuples(pieces[: count.value], keys, contents)
    if state != END:
        raise OddArchive(f"at byte {offset.value}")


def _as_tuples(
    pieces: NDArray[Any], keys: NDArray[np.uint8], contents: NDArray[np.uint8]
) -> list[Piece]:
    if not len(pieces):
        return []
    key_bytes = keys[: pieces["key_end"][-1]].tobytes()
    content = contents[: pieces["content_end"].max()].tobytes()
    is_ascii = key_bytes.isascii()
    text = key_bytes.decode("ascii", "replace")
    return [
        (
            text[start:end] if is_ascii else key_bytes[start:end].decode("utf-8", NOT_UTF8),
            offset,
            size,
            width,
            height,
            None,
            EXTENSIONS[label if too_large < 0 else too_large],
            content[first:last] if label >= 0 else None,
        )
        for offset, size, width, height, start, end, label, first, last, too_large in (
            pieces.tolist()
        )
    ]


@cache
def _library() -> Any:
    """The C function `tar_walk`, None where it is not built for this release."""
    library = load_library(MODULE, abi_function="tar_walk_abi", abi_version=ABI_VERSION)
    if library is None:
        return None
    walk = library.tar_walk
    pointer, number = ctypes.c_void_p, ctypes.c_int32
    walk.argtypes = [ctypes.c_int, ctypes.c_int64, pointer, pointer, number]
    walk.argtypes += [pointer, pointer, number, pointer, number]
    return walk
