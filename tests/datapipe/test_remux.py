"""Restart markers without loss, and never a repaired file."""

from __future__ import annotations

import struct
from io import BytesIO

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from datapipe.errors import DecodeError
from datapipe.remux import is_available, with_restart_markers
from tests.datapipe.jpegs import KINDS, Kind, jpeg, noisy
from tests.datapipe.small_sets import encode, picture

pytestmark = pytest.mark.skipif(not is_available(), reason="re-muxing takes the native kernel")


def restart_interval(payload: bytes) -> int:
    """MCUs between two markers."""
    place = payload.index(b"\xff\xdd\x00\x04")
    (interval,) = struct.unpack_from(">H", payload, place + 4)
    return int(interval)


@given(st.sampled_from(KINDS), st.integers(1, 300), st.integers(1, 60), st.integers(20, 100))
def test_pixels_stay_the_same(kind: Kind, width: int, height: int, quality: int) -> None:
    payload = jpeg(kind, width, height, quality=quality)
    remuxed = with_restart_markers(payload)
    with Image.open(BytesIO(payload)) as before, Image.open(BytesIO(remuxed)) as after:
        assert before.mode == after.mode
        assert np.array_equal(np.asarray(before), np.asarray(after))
        assert not after.info.get("progressive")
    mcu_width = 16 if kind.subsampling else 8
    mcus_in_row = -(-width // mcu_width)
    assert mcus_in_row % restart_interval(remuxed) == 0
    assert with_restart_markers(remuxed) == remuxed


def test_what_else_the_file_says_is_kept() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = BytesIO()
    noisy(40, 30).save(buffer, "JPEG", exif=exif, icc_profile=b"profile" * 20, comment=b"hello")
    remuxed = Image.open(BytesIO(with_restart_markers(buffer.getvalue())))
    assert remuxed.getexif()[0x0112] == 6
    assert remuxed.info["icc_profile"] == b"profile" * 20
    assert remuxed.info["comment"] == b"hello"


@pytest.mark.parametrize(
    "payload", [encode(picture(1), "PNG"), encode(picture(1), "WEBP"), b"", b"?"]
)
def test_what_is_no_jpeg_comes_back_as_it_is(payload: bytes) -> None:
    assert with_restart_markers(payload) is payload


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_a_damaged_file_is_refused(kind: Kind) -> None:
    payload = jpeg(kind, 90, 70)
    start = payload.index(b"\xff\xda") + 20
    hole = payload[: start + 100] + b"\xff\xd9" + payload[start + 100 :]
    for damaged in (payload[: len(payload) // 2], payload[:-2], hole[: len(hole) // 2] + hole[-2:]):
        with pytest.raises(DecodeError, match="truncated or corrupt"):
            with_restart_markers(damaged)


def test_a_progressive_file_without_its_last_scans_is_refused() -> None:
    payload = jpeg(Kind("progressive", progressive=True), 90, 70)
    scans = payload.split(b"\xff\xda")
    with pytest.raises(DecodeError, match="scans do not hold the whole image"):
        with_restart_markers(b"\xff\xda".join(scans[:3]) + b"\xff\xd9")
