"""What becomes of an image's bytes when it is packed: checked, and as JPEG made quick to decode.

By default a JPEG gets restart markers: its coefficients are copied, its pixels stay as they are
(`datapipe.remux`), and a decoder can start at any of the markers. Re-encoding changes the pixels,
and is done only where it is asked for. What is no JPEG stays as it is, unless it is re-encoded.
"""

from __future__ import annotations

import logging
import platform
from dataclasses import dataclass, replace
from io import BytesIO

from PIL import Image

from datapipe import remux
from datapipe.decode import check_decodes
from datapipe.errors import PackingError
from datapipe.with_pillow import rgb_image

logger = logging.getLogger(__name__)

CHROMA_4_2_0 = 2
"""Pillow's number for it."""


@dataclass(frozen=True)
class PayloadOptions:
    """What is done to each image."""

    restart_markers: bool = True
    reencode_quality: int | None = None
    """JPEG quality of a new encoding, 1 to 95; None keeps the pixels that there are."""
    reencode_long_side: int | None = None
    """Pixels that the longer side of a re-encoded image is scaled down to, if it has more."""

    def __post_init__(self) -> None:
        quality, long_side = self.reencode_quality, self.reencode_long_side
        if quality is not None and not 1 <= quality <= 95:
            raise ValueError(f"--reencode-quality is {quality}; allowed: 1 to 95")
        if long_side is not None and long_side < 1:
            raise ValueError(f"--reencode-long-side is {long_side}; allowed: at least 1")
        if long_side is not None and quality is None:
            raise ValueError(
                "--reencode-long-side is given without --reencode-quality; scaling needs a new "
                "encoding: give both, or neither"
            )

    def __str__(self) -> str:
        """Differs wherever the packed bytes differ."""
        parts = ["restart markers"] if self.restart_markers else []
        if self.reencode_quality is not None:
            parts.append(f"quality {self.reencode_quality}")
        if self.reencode_long_side is not None:
            parts.append(f"long side {self.reencode_long_side}")
        return ", ".join(parts) or "as it is"

    def available(self) -> PayloadOptions:
        """These, without restart markers where they cannot be made here; a warning says so."""
        if not self.restart_markers or remux.is_available():
            return self
        logger.warning(
            "shards will carry no restart markers, as the native kernel is not active here; "
            "decoding crops of them will take about a quarter longer than it need; "
            "`python -m datapipe doctor` says why, --no-restart-markers accepts it"
        )
        return replace(self, restart_markers=False)

    def check_available(self) -> None:
        """Raise `PackingError` where restart markers are wanted, and cannot be made here."""
        if self.restart_markers and not remux.is_available():
            raise PackingError(
                f"{platform.node()}: restart markers cannot be made here, as the native kernel is "
                "not active; install it on every machine that packs (`python -m datapipe doctor` "
                "says what is missing), or pack with --no-restart-markers everywhere"
            )

    def extension(self, extension: str) -> str:
        """Of an image with this one, when it is packed."""
        return extension if self.reencode_quality is None else "jpg"

    def apply(self, payload: bytes) -> bytes:
        """The bytes to be packed. Raises `DecodeError` if they are not an image that decodes."""
        if self.reencode_quality is not None:
            payload = _reencoded(payload, self.reencode_quality, self.reencode_long_side)
        marked = remux.with_restart_markers(payload) if self.restart_markers else payload
        if marked == payload:  # what was given markers has been decoded, to compare the pixels
            check_decodes(payload)
        return marked


def _reencoded(payload: bytes, quality: int, long_side: int | None) -> bytes:
    """A 4:2:0 JPEG of the same image, without what it says about colour profiles or its camera."""
    pixels = rgb_image(payload)
    scale = 1.0 if long_side is None else min(1.0, long_side / max(pixels.size))
    if scale < 1:
        width, height = (max(1, round(side * scale)) for side in pixels.size)
        pixels = pixels.resize((width, height), Image.Resampling.LANCZOS)
    buffer = BytesIO()
    pixels.save(buffer, "JPEG", quality=quality, subsampling=CHROMA_4_2_0, optimize=True)
    return buffer.getvalue()
