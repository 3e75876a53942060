"""Decoding with Pillow: the reference, and what other decoders leave to it."""

from __future__ import annotations

import struct
from io import BytesIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from datapipe.errors import DecodeError
from datapipe.kernel import LARGEST_IMAGE_PIXELS, Box, Payload

FORMATS = ("JPEG", "PNG", "WEBP")
PILLOW_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    struct.error,
    Image.DecompressionBombError,
    Warning,
)
"""What Pillow raises for broken files: each format's reader has its own ways, and warnings may have
been made errors.
"""


def decode_into(payload: Payload, box: Box, flip: bool, out: NDArray[np.uint8]) -> None:
    """Decode, crop to `box` (left, top, right, bottom in float pixels), scale, mirror.

    out: (S, S, 3) uint8, RGB. Grey, palette and CMYK images become RGB, without what they say about
    transparency. Raises `DecodeError`.
    """
    size = out.shape[0]
    try:
        with _open(payload) as image:
            scaled = _rgb(image).resize((size, size), Image.Resampling.BILINEAR, box=box)
            pixels = np.asarray(scaled)
    except PILLOW_ERRORS as error:
        raise DecodeError(_reason(error)) from error
    out[...] = pixels[:, ::-1] if flip else pixels


def image_size(payload: Payload) -> tuple[int, int]:
    """(width, height) from the header alone. Raises `DecodeError`."""
    try:
        with _open(payload) as image:
            return image.size
    except PILLOW_ERRORS as error:
        raise DecodeError(_reason(error)) from error


def check_decodes(payload: Payload) -> None:
    """Decode all of the image and drop the result. Raises `DecodeError`."""
    try:
        with _open(payload) as image:
            image.load()
    except PILLOW_ERRORS as error:
        raise DecodeError(_reason(error)) from error


def rgb_image(payload: Payload) -> Image.Image:
    """The whole image in RGB, and nothing that its file says beside the pixels.

    Raises `DecodeError`.
    """
    try:
        with _open(payload) as image:
            image.load()
            pixels = _rgb(image)
    except PILLOW_ERRORS as error:
        raise DecodeError(_reason(error)) from error
    pixels.info.clear()
    return pixels


def _open(payload: Payload) -> Image.Image:
    image = Image.open(BytesIO(payload), formats=FORMATS)
    width, height = image.size
    if width * height > LARGEST_IMAGE_PIXELS:
        raise DecodeError(
            f"{width} x {height} pixels; allowed: {LARGEST_IMAGE_PIXELS // 1_000_000} megapixels"
        )
    return image


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I"):  # 16 bits, which `convert` would clip to 255
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    image.load()
    image.info.pop("transparency", None)  # or `convert` warns that it drops a palette's
    return image.convert("RGB")


def _reason(error: BaseException) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "not a JPEG, PNG or WebP image"
    return str(error) or type(error).__name__
