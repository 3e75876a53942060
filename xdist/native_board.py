"""A board of weights, as `xdist.weights_board` uses it: `native/board.c` by ctypes.

It is installed beside the packages, where a compiler was present and the system is Linux. `board`
is the page that holds its stamps.
"""

from __future__ import annotations

import ctypes
from functools import cache

import torch
from torch import Tensor

from datapipe.native_library import load_library

MODULE = "xdist_board"
ABI_VERSION = 1


def is_available() -> bool:
    return _library() is not None


def begin(board: Tensor, buffer: int) -> None:
    """The writer is about to change this buffer."""
    _functions().board_begin(_pointer(board), buffer)


def publish(board: Tensor, buffer: int, *, version: int) -> None:
    """The buffer is whole; readers that wait are woken."""
    _functions().board_publish(_pointer(board), buffer, ctypes.c_int64(version))


def num_published(board: Tensor) -> int:
    """Modulo 2**32."""
    return int(_functions().board_num_published(_pointer(board)))


def wait(board: Tensor, seen: int, *, timeout_s: float) -> bool:
    """Sleep while `num_published` is `seen`; False if it still is after that time, or a signal."""
    timeout = ctypes.c_double(timeout_s)
    return bool(_functions().board_wait(_pointer(board), ctypes.c_uint32(seen), timeout))


def read(
    board: Tensor, buffers: tuple[Tensor, ...], out: Tensor, *, stride_bytes: int, min_version: int
) -> int | None:
    """Copy the newest buffer to `out` (float32) and return its version. None if it is older than
    `min_version`, or was overwritten meanwhile; then `out` holds anything.
    """
    version = _functions().board_read(
        _pointer(board),
        len(buffers),
        _pointer(buffers[0]),
        ctypes.c_size_t(stride_bytes),
        buffers[0].dtype == torch.bfloat16,
        _pointer(out),
        ctypes.c_size_t(out.numel()),
        ctypes.c_int64(min_version),
    )
    return None if version < 0 else int(version)


def _pointer(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def _functions() -> ctypes.CDLL:
    library = _library()
    assert library is not None, "ask is_available first"
    return library


@cache
def _library() -> ctypes.CDLL | None:
    """The C functions, None where they are not built for this release."""
    library = load_library(MODULE, abi_function="board_abi", abi_version=ABI_VERSION)
    if library is not None:
        library.board_read.restype = ctypes.c_int64
        library.board_num_published.restype = ctypes.c_uint32
    return library
