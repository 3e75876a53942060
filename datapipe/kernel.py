"""The native kernel: what native/jpeg/native.h promises, called by ctypes, where it is installed.

Nothing is shared between calls, and the interpreter's lock is not held during one, so threads
decode side by side.
"""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from datapipe.errors import DecodeError

LIBRARY = "datapipe_native"
"""The module under which setup.py installs the library, beside the packages."""
ABI = 1
"""NATIVE_ABI of the native.h that this file calls."""
REASON_BYTES = 256
LARGEST_IMAGE_PIXELS = 64_000_000
"""Of an image; more are refused by the header, before memory is taken for them."""

Box = tuple[float, float, float, float]
Payload = bytes | memoryview


@dataclass(frozen=True)
class KernelInfo:
    """Which decoder is active, and what it is made of, or why it is not the native one."""

    name: Literal["native", "fallback"]
    detail: str


class NativeKernel:
    """The functions of a loaded library. JPEGs only."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        library.native_description.restype = ctypes.c_char_p
        library.native_remux.restype = ctypes.c_void_p

    def description(self) -> str:
        return str(self._library.native_description().decode())

    def decode_batch(
        self,
        payloads: Sequence[Payload],
        boxes: Sequence[Box],
        flips: Sequence[bool],
        outs: Sequence[NDArray[np.uint8]],
    ) -> list[str | None]:
        """Decode each box into its out, all (S, S, 3) and contiguous; the reasons, or None."""
        count = len(payloads)
        if not count:
            return []
        contents = [np.frombuffer(payload, np.uint8) for payload in payloads]
        reasons = ctypes.create_string_buffer(count * REASON_BYTES)
        arguments: list[NDArray[Any]] = [
            np.array([_address(content) for content in contents], np.uint64),
            np.array([len(content) for content in contents], np.uint64),
            np.array(boxes, np.float32),
            np.array(flips, np.uint8),
            np.array([_address(out) for out in outs], np.uint64),
        ]
        starts, sizes, edges, mirrored, targets = [_pointer(values) for values in arguments]
        self._library.native_decode_batch(
            count, starts, sizes, edges, mirrored, outs[0].shape[0], targets, reasons
        )
        texts = reasons.raw
        return [
            _text(texts[i * REASON_BYTES : (i + 1) * REASON_BYTES]) or None for i in range(count)
        ]

    def image_size(self, payload: Payload) -> tuple[int, int]:
        """(width, height) from the header. Raises `DecodeError`."""
        content = np.frombuffer(payload, np.uint8)
        width, height = ctypes.c_int32(), ctypes.c_int32()
        reason = ctypes.create_string_buffer(REASON_BYTES)
        self._library.native_image_size(
            _pointer(content),
            ctypes.c_size_t(len(content)),
            ctypes.byref(width),
            ctypes.byref(height),
            reason,
        )
        _raise_if(reason)
        return width.value, height.value

    def check(self, payload: Payload) -> None:
        """Decode all of it. Raises `DecodeError`."""
        content = np.frombuffer(payload, np.uint8)
        reason = ctypes.create_string_buffer(REASON_BYTES)
        self._library.native_check(_pointer(content), ctypes.c_size_t(len(content)), reason)
        _raise_if(reason)

    def remux(self, payload: Payload) -> bytes:
        """The same coefficients with restart markers; decodes to the same pixels, or
        `DecodeError`.
        """
        content = np.frombuffer(payload, np.uint8)
        size = ctypes.c_size_t()
        reason = ctypes.create_string_buffer(REASON_BYTES)
        result = self._library.native_remux(
            _pointer(content), ctypes.c_size_t(len(content)), ctypes.byref(size), reason
        )
        _raise_if(reason)
        try:
            return ctypes.string_at(result, size.value)
        finally:
            self._library.native_free(ctypes.c_void_p(result))

    def resize(
        self,
        pixels: NDArray[np.uint8],
        box: Box,
        flip: bool,
        out: NDArray[np.uint8],
        *,
        is_portable: bool,
    ) -> None:
        """Scale a box of (H, W, 4) pixels, of which 3 channels count, into (S, S, 3).

        is_portable: without the instructions that `description` names. Raises `DecodeError`.
        """
        height, width = pixels.shape[:2]
        padded = np.concatenate([pixels.ravel(), np.zeros(64, np.uint8)])
        reason = ctypes.create_string_buffer(REASON_BYTES)
        self._library.native_resize(
            _pointer(padded),
            width,
            height,
            _pointer(np.array(box, np.float32)),
            flip,
            out.shape[0],
            is_portable,
            _pointer(out),
            reason,
        )
        _raise_if(reason)


@dataclass(frozen=True)
class LoadedKernel:
    """The kernel, or None and why there is none."""

    kernel: NativeKernel | None
    detail: str


@cache
def load_kernel() -> LoadedKernel:
    """The installed kernel, if it can be used; looked for once in a process."""
    spec = importlib.util.find_spec(LIBRARY)
    if spec is None or spec.origin is None:
        return LoadedKernel(None, f"the library {LIBRARY} is not installed")
    return kernel_at(spec.origin)


def kernel_at(path: str) -> LoadedKernel:
    """The kernel in this file, if it is one that these sources can call."""
    try:
        library = ctypes.CDLL(path)
        abi = library.native_abi()
    except (OSError, AttributeError) as error:
        return LoadedKernel(None, f"{path} cannot be loaded: {error}")
    if abi != ABI:
        return LoadedKernel(
            None, f"{path} has interface {abi}, these sources call {ABI}: install them again"
        )
    kernel = NativeKernel(library)
    return LoadedKernel(kernel, f"{kernel.description()}, {path}")


def _address(array: NDArray[np.uint8]) -> int:
    return int(array.__array_interface__["data"][0])


def _pointer(array: NDArray[Any]) -> ctypes.c_void_p:
    """To an array that the caller keeps for as long as the pointer is used."""
    return ctypes.c_void_p(array.ctypes.data)


def _text(reason: bytes) -> str:
    return reason.partition(b"\0")[0].decode("utf-8", "replace")


def _raise_if(reason: ctypes.Array[ctypes.c_char]) -> None:
    if text := _text(reason.raw):
        raise DecodeError(text)
