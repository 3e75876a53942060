"""Sizes by the first bytes of an image, against Pillow's."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from datapipe.image_header import MOST_SEGMENTS, has_restart_markers, header_size
from tests.datapipe.small_sets import picture


def size_of(payload: bytes) -> tuple[int, int] | None:
    return header_size(lambda place, count: payload[place : place + count])


@given(width=st.integers(1, 300), height=st.integers(1, 300))
@pytest.mark.parametrize(
    ("kind", "mode", "options"),
    [
        ("JPEG", "RGB", {"progressive": True, "icc_profile": b"x" * 70_000, "exif": b"Exif\0\0MM"}),
        ("JPEG", "L", {}),
        ("JPEG", "CMYK", {"restart_marker_blocks": 2}),
        ("PNG", "RGBA", {}),
        ("PNG", "P", {}),
        ("WEBP", "RGB", {}),
        ("WEBP", "RGB", {"lossless": True}),
        ("WEBP", "RGBA", {"icc_profile": b"x" * 100}),
    ],
)
def test_sizes_are_those_of_pillow(
    kind: str, mode: str, options: dict[str, object], width: int, height: int
) -> None:
    buffer = BytesIO()
    Image.new(mode, (width, height)).save(buffer, kind, **options)
    assert size_of(buffer.getvalue()) == (width, height)


@given(st.binary(max_size=200))
def test_any_bytes_have_a_size_or_none(payload: bytes) -> None:
    for start in (b"", b"\xff\xd8", b"\xff\xd8\xff", b"RIFF\0\0\0\0WEBPVP8 "):
        size = size_of(start + payload)
        assert size is None or min(size) >= 1


def test_a_jpeg_of_endless_segments_is_no_image() -> None:
    assert size_of(b"\xff\xd8" + b"\xff" * 2 * MOST_SEGMENTS) == (0, 0)


@pytest.mark.parametrize(
    ("kind", "options", "has_them"),
    [
        ("JPEG", {"restart_marker_blocks": 4}, True),
        ("JPEG", {"restart_marker_rows": 1, "exif": b"Exif\0\0MM"}, True),
        ("JPEG", {}, False),
        ("PNG", {}, False),
    ],
)
def test_restart_markers_are_seen(kind: str, options: dict[str, object], has_them: bool) -> None:
    buffer = BytesIO()
    picture(0).save(buffer, kind, **options)
    assert has_restart_markers(buffer.getvalue()) == has_them
    assert not has_restart_markers(buffer.getvalue()[:20])


def test_sizes_of_real_images_are_those_of_pillow(shared_data: Path) -> None:
    for path in sorted((shared_data / "imagenet-sample").iterdir()):
        with Image.open(path) as image:
            assert size_of(path.read_bytes()) == image.size, path
