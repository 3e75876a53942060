"""The fallback, whatever kernel is active: Pillow's pixels, and the same refusals."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from threading import Barrier

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from datapipe.antialiasing import work_alone
from datapipe.decode import image_size
from datapipe.errors import DecodeError
from datapipe.fallback import check_decodes, decode_into
from tests.datapipe.jpegs import (
    KINDS,
    Box,
    Kind,
    goes_along_rows_first,
    jpeg,
    scaled_by_pillow,
    with_many_scans,
    with_size,
)
from tests.real_images import shared_data as shared_data

shares = st.floats(0, 1, width=32)


def decoded(payload: bytes, box: Box, side: int, *, flip: bool = False) -> NDArray[np.uint8]:
    out = np.zeros((side, side, 3), np.uint8)
    decode_into(payload, box, flip, out)
    return out


@given(
    st.sampled_from(KINDS),
    st.integers(1, 150),
    st.integers(1, 100),
    st.integers(8, 60),
    st.tuples(shares, shares, shares, shares),
    st.booleans(),
)
def test_pixels_are_pillows(
    kind: Kind,
    width: int,
    height: int,
    side: int,
    edges: tuple[float, float, float, float],
    flip: bool,
) -> None:
    left, right = sorted(edge * width for edge in edges[:2])
    top, bottom = sorted(edge * height for edge in edges[2:])
    payload, box = jpeg(kind, width, height), (left, top, right, bottom)
    expected = scaled_by_pillow(payload, box, side).astype(int)
    found = decoded(payload, box, side, flip=flip)
    difference = np.abs((found[:, ::-1] if flip else found) - expected)
    # Weights of 24 bits instead of Pillow's 22 round a value in thousands the other way.
    assert difference.max() <= 1
    if goes_along_rows_first(width, height, side):
        assert difference.mean() <= 0.05


def test_real_images_differ_from_pillow_by_little(shared_data: Path) -> None:
    differences = []
    for path in sorted((shared_data / "imagenet-sample").glob("*.JPEG"))[::10]:
        payload = path.read_bytes()
        width, height = image_size(payload)
        box = (width * 0.21, height * 0.13, width * 0.83, height * 0.91)
        expected = scaled_by_pillow(payload, box, 299).astype(int)
        differences.append(np.abs(decoded(payload, box, 299) - expected).mean())
    assert np.mean(differences) <= 0.05


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_a_truncated_file_is_an_error(kind: Kind) -> None:
    payload = jpeg(kind, 90, 70)
    for cut in (3, len(payload) // 2, len(payload) - 2):
        with pytest.raises(DecodeError):
            decoded(payload[:cut], (0, 0, 9, 9), 16)
        with pytest.raises(DecodeError):
            check_decodes(payload[:cut])


def test_bytes_too_many_at_the_end_do_no_harm() -> None:
    payload = jpeg(Kind("444"), 40, 30)
    longer = payload[:-2] + b"\0\0\xff\xd9"
    box = (0.0, 0.0, 40.0, 30.0)
    assert np.array_equal(decoded(longer, box, 32), decoded(payload, box, 32))
    check_decodes(longer)


ADOBE_OF_ANOTHER_TRANSFORM = b"\xff\xee\0\x0eAdobe\0\x64\0\0\0\0\7"
HALF_A_PROFILE = b"\xff\xe2\0\x1aICC_PROFILE\0\3\1half of it"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"JFIF\0\1", b"JFIF\0\2"),
        (b"\xff\xe0\0\x10JFIF\0\1\1\0\0\1\0\1\0\0", ADOBE_OF_ANOTHER_TRANSFORM),
        (b"\xff\xdb", HALF_A_PROFILE + b"\xff\xdb"),
    ],
    ids=["a later JFIF", "an unknown Adobe transform", "a broken colour profile"],
)
def test_what_says_nothing_of_the_pixels_does_no_harm(old: bytes, new: bytes) -> None:
    payload = jpeg(Kind("420 with markers", subsampling=2, restart_marker_blocks=2), 90, 70)
    assert old in payload
    noted, box = payload.replace(old, new, 1), (3.0, 5.0, 80.0, 60.0)
    assert np.array_equal(decoded(noted, box, 32), decoded(payload, box, 32))
    check_decodes(noted)
    cut = noted[: len(noted) // 2] + b"\xff\xd9"
    with pytest.raises(DecodeError):
        check_decodes(cut)
    with pytest.raises(DecodeError):
        decoded(cut, (0, 0, 90, 70), 16)


def test_rare_samplings_of_the_colours_are_left_to_pillow() -> None:
    """15 units of 3 blocks, all of the same bits, are as well 9 of 2 + 2 + 1 blocks."""
    buffer = BytesIO()
    Image.new("RGB", (40, 24), (128, 128, 128)).save(buffer, "JPEG", subsampling=0, optimize=True)
    payload = bytearray(with_size(buffer.getvalue(), 48, 48))
    frame = payload.index(b"\xff\xc0")
    payload[frame + 11], payload[frame + 14] = 0x21, 0x12
    assert (decoded(bytes(payload), (0, 0, 48, 48), 16) == 128).all()
    check_decodes(bytes(payload))
    with pytest.raises(DecodeError, match="truncated"):
        check_decodes(bytes(payload[:-2]))


def test_a_file_that_would_take_too_long_is_refused() -> None:
    check_decodes(with_many_scans(20))
    for payload, reason in (
        (with_many_scans(500), "scans are more than any encoder makes"),
        (with_size(jpeg(KINDS[0], 40, 30), 8001, 8001), "allowed: 64 megapixels"),
    ):
        with pytest.raises(DecodeError, match=reason):
            check_decodes(payload)


def test_a_box_outside_the_image_is_refused() -> None:
    with pytest.raises(DecodeError, match="not inside the image"):
        decoded(jpeg(KINDS[0], 40, 30), (0, 0, 41, 9), 16)


def test_threads_that_decode_work_alone_and_leave_torchs_threads_to_others() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with ThreadPoolExecutor(2, initializer=work_alone, initargs=(3,)) as executor:
            barrier = Barrier(2)

            def num_threads() -> int:
                barrier.wait(10)
                return torch.get_num_threads()

            assert [one.result() for one in [executor.submit(num_threads) for _ in "ab"]] == [1, 1]
        assert torch.get_num_threads() == 3
        with ThreadPoolExecutor(1) as executor:
            assert executor.submit(torch.get_num_threads).result() == 3
    finally:
        torch.set_num_threads(before)
