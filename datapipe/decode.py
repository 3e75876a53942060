"""Image bytes -> one crop of it in a batch buffer, by the fastest decoder there is.

JPEGs go to the native kernel where it is installed, else to `datapipe.fallback`; PNG and WebP,
which such sets hold under any name, to Pillow. All give Pillow's pixels, but for some roundings.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from datapipe import fallback, with_pillow
from datapipe.errors import DecodeError
from datapipe.kernel import (
    LARGEST_IMAGE_PIXELS,
    Box,
    KernelInfo,
    NativeKernel,
    Payload,
    load_kernel,
)

__all__ = [
    "LARGEST_IMAGE_PIXELS",
    "Box",
    "DecodeError",
    "KernelInfo",
    "Payload",
    "active_kernel",
    "check_decodes",
    "decode_batch",
    "decode_into",
    "image_size",
    "is_jpeg",
]

JPEG_START = b"\xff\xd8\xff"


def active_kernel() -> KernelInfo:
    """Which decoder JPEGs go to in this process."""
    loaded = load_kernel()
    return KernelInfo("native" if loaded.kernel else "fallback", loaded.detail)


def decode_batch(
    payloads: Sequence[Payload],
    boxes: Sequence[Box],
    flips: Sequence[bool],
    outs: Sequence[NDArray[np.uint8]],
) -> list[str | None]:
    """Decode, crop to each box (left, top, right, bottom in float pixels), scale, mirror.

    outs: (S, S, 3) uint8, RGB, contiguous, S the same for all. Returns for each image why it could
    not be decoded (its out may then be written in part), or None.
    """
    kernel = load_kernel().kernel
    if kernel is not None and all(map(is_jpeg, payloads)):
        return kernel.decode_batch(payloads, boxes, flips, outs)
    return [
        _reason_of(kernel, payload, box, flip, out)
        for payload, box, flip, out in zip(payloads, boxes, flips, outs, strict=True)
    ]


def decode_into(payload: Payload, box: Box, flip: bool, out: NDArray[np.uint8]) -> None:
    """`decode_batch` for one image. Raises `DecodeError`.

    Grey, palette and CMYK images become RGB, without what they say about transparency.
    """
    (reason,) = decode_batch([payload], [box], [flip], [out])
    if reason is not None:
        raise DecodeError(reason)


def image_size(payload: Payload) -> tuple[int, int]:
    """(width, height) from the header alone. Raises `DecodeError`."""
    kernel = load_kernel().kernel
    if kernel is not None and is_jpeg(payload):
        return kernel.image_size(payload)
    return with_pillow.image_size(payload)


def check_decodes(payload: Payload) -> None:
    """Decode all of the image and drop the result. Raises `DecodeError`."""
    kernel = load_kernel().kernel
    if not is_jpeg(payload):
        with_pillow.check_decodes(payload)
    elif kernel is not None:
        kernel.check(payload)
    else:
        fallback.check_decodes(payload)


def is_jpeg(payload: Payload) -> bool:
    return bytes(payload[:3]) == JPEG_START


def _reason_of(
    kernel: NativeKernel | None, payload: Payload, box: Box, flip: bool, out: NDArray[np.uint8]
) -> str | None:
    if not is_jpeg(payload):
        return _attempted(with_pillow.decode_into, payload, box, flip, out)
    if kernel is None:
        return _attempted(fallback.decode_into, payload, box, flip, out)
    return kernel.decode_batch([payload], [box], [flip], [out])[0]


def _attempted(
    decode: Callable[[Payload, Box, bool, NDArray[np.uint8]], None],
    payload: Payload,
    box: Box,
    flip: bool,
    out: NDArray[np.uint8],
) -> str | None:
    try:
        decode(payload, box, flip, out)
    except DecodeError as error:
        return str(error)
    return None
