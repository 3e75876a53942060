"""What is done to an image's bytes: nothing to its pixels, unless a new encoding is asked for."""

from __future__ import annotations

import logging
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from datapipe.decode import DecodeError, decode_into
from datapipe.errors import PackingError
from datapipe.payloads import PayloadOptions
from tests.datapipe.small_sets import encode, picture

PLAIN = PayloadOptions(restart_markers=False)
AGAIN = PayloadOptions(restart_markers=False, reencode_quality=90, reencode_long_side=100)


def opened(payload: bytes) -> Image.Image:
    return Image.open(BytesIO(payload))


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP"])
def test_bytes_stay_as_they_are_without_restart_markers(image_format: str) -> None:
    payload = encode(picture(1), image_format)
    assert PLAIN.apply(payload) == payload


@pytest.mark.parametrize("options", [PLAIN, AGAIN])
@pytest.mark.parametrize("payload", [b"", b"no image", encode(picture(1))[:-30]])
def test_what_does_not_decode_is_refused(options: PayloadOptions, payload: bytes) -> None:
    with pytest.raises(DecodeError):
        options.apply(payload)


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((200, 150), (100, 75)),
        ((150, 200), (75, 100)),
        ((100, 30), (100, 30)),
        ((900, 1), (100, 1)),
    ],
)
def test_a_new_encoding_scales_down_the_longer_side(
    size: tuple[int, int], expected: tuple[int, int]
) -> None:
    image = opened(AGAIN.apply(encode(picture(1, width=size[0], height=size[1]))))
    assert image.format == "JPEG"
    assert image.size == expected
    assert AGAIN.extension("png") == "jpg"
    assert PLAIN.extension("png") == "png"


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "I;16", "CMYK", "1"])
def test_a_new_encoding_is_of_the_pixels_that_the_decoder_sees(mode: str) -> None:
    ramp = np.add.outer(np.arange(32) * 4, np.arange(32) * 3)
    if mode == "I;16":
        image = Image.fromarray((ramp * 256).astype(np.uint16))
    else:
        image = picture(3, width=32, height=32).convert(mode)
    transparency: Any = 0 if mode == "P" else None
    payload = encode(image, "JPEG" if mode == "CMYK" else "PNG", transparency=transparency)
    seen = np.zeros((32, 32, 3), np.uint8)
    decode_into(payload, (0, 0, 32, 32), False, seen)
    expected = BytesIO()
    Image.fromarray(seen).save(expected, "JPEG", quality=95, subsampling="4:2:0", optimize=True)
    options = PayloadOptions(restart_markers=False, reencode_quality=95)
    assert options.apply(payload) == expected.getvalue()


def test_restart_markers_leave_the_pixels_as_they_are(shared_data: Path) -> None:
    options = PayloadOptions().available()
    if not options.restart_markers:
        pytest.skip("the native kernel, which adds restart markers, is not active")
    for path in sorted((shared_data / "imagenet-sample").glob("*.JPEG"))[:3]:
        payload = path.read_bytes()
        marked = options.apply(payload)
        assert b"\xff\xdd\x00\x04" in marked  # the segment that announces them
        assert b"\xff\xdd\x00\x04" not in payload
        with Image.open(path) as before, Image.open(BytesIO(marked)) as after:
            assert before.tobytes() == after.tobytes()
    again = replace(options, reencode_quality=80).apply(payload)
    assert b"\xff\xdd\x00\x04" in again
    assert options.apply(encode(picture(1), "PNG")) == encode(picture(1), "PNG")


def test_options_that_pack_other_bytes_have_another_text() -> None:
    options = [
        PLAIN,
        AGAIN,
        PayloadOptions(),
        PayloadOptions(reencode_quality=90, reencode_long_side=100),
        PayloadOptions(reencode_quality=91, reencode_long_side=100),
        PayloadOptions(reencode_quality=90),
    ]
    assert len({str(option) for option in options}) == len(options)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"reencode_quality": 0}, "--reencode-quality is 0; allowed: 1 to 95"),
        ({"reencode_quality": 96}, "--reencode-quality is 96; allowed: 1 to 95"),
        ({"reencode_quality": 90, "reencode_long_side": 0}, "--reencode-long-side is 0; allowed"),
        ({"reencode_long_side": 500}, "without --reencode-quality; scaling needs a new encoding"),
    ],
)
def test_options_that_cannot_be_are_refused(arguments: dict[str, int], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        PayloadOptions(**arguments)  # type: ignore[arg-type]


def test_a_machine_without_the_kernel_says_so_and_packs_no_part_of_a_marked_set(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING):
        options = PayloadOptions().available()
    if options.restart_markers:
        pytest.skip("the native kernel is active here")
    assert "shards will carry no restart markers" in caplog.text
    options.check_available()
    with pytest.raises(PackingError, match="restart markers cannot be made here, as the native"):
        PayloadOptions().check_available()


def test_plain_packing_needs_no_kernel_and_says_nothing(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert PLAIN.available() == PLAIN
    assert caplog.text == ""
