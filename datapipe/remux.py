"""Restart markers for JPEGs, without loss: a crop then needs only a part of the file decoded.

The DCT coefficients are copied, with Huffman tables made for them; the pixels of both files are
compared. It takes the native kernel.
"""

from __future__ import annotations

from datapipe.decode import is_jpeg
from datapipe.errors import DecodeError
from datapipe.kernel import load_kernel


def is_available() -> bool:
    return load_kernel().kernel is not None


def with_restart_markers(payload: bytes) -> bytes:
    """The same JPEG with a marker about every 64 pixels; what is no JPEG comes back as it is.

    Progressive files become sequential; all other markers (EXIF, colour profile) are kept. Raises
    `DecodeError` if the file is truncated or corrupt, or the kernel is missing.
    """
    if not is_jpeg(payload):
        return payload
    loaded = load_kernel()
    if loaded.kernel is None:
        raise DecodeError(f"restart markers take the native kernel: {loaded.detail}")
    return loaded.kernel.remux(payload)
