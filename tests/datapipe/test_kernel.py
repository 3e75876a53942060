"""The native kernel: Pillow's pixels from a part of the file; a reason for every damaged one."""

from __future__ import annotations

import subprocess
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from shutil import which

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from datapipe.errors import DecodeError
from datapipe.kernel import Box, NativeKernel, kernel_at, load_kernel
from tests.datapipe.jpegs import (
    KINDS,
    Kind,
    goes_along_rows_first,
    jpeg,
    scaled_by_pillow,
    with_many_scans,
    with_size,
)
from tests.real_images import shared_data as shared_data

NATIVE = Path(__file__).parents[2] / "native"
CORPUS = sorted((Path(__file__).parent / "corpus").iterdir())
shares = st.floats(0, 1, width=32)


@pytest.fixture(scope="module")
def kernel() -> NativeKernel:
    loaded = load_kernel()
    if loaded.kernel is None:
        pytest.skip(f"no native kernel: {loaded.detail}; python -m datapipe doctor says why")
    return loaded.kernel


def decoded(
    kernel: NativeKernel, payload: bytes, box: Box, side: int, *, flip: bool = False
) -> NDArray[np.uint8]:
    out = np.zeros((side, side, 3), np.uint8)
    (reason,) = kernel.decode_batch([payload], [box], [flip], [out])
    if reason is not None:
        raise DecodeError(reason)
    return out


def box_in(width: int, height: int, edges: tuple[float, float, float, float]) -> Box:
    """From two shares of the width and two of the height."""
    left, right = sorted(edge * width for edge in edges[:2])
    top, bottom = sorted(edge * height for edge in edges[2:])
    return left, top, right, bottom


@given(
    st.integers(1, 90),
    st.integers(1, 90),
    st.integers(8, 60),
    st.tuples(shares, shares, shares, shares),
    st.booleans(),
)
def test_scaling_is_pillows_to_the_bit(
    kernel: NativeKernel,
    width: int,
    height: int,
    side: int,
    edges: tuple[float, float, float, float],
    flip: bool,
) -> None:
    box = box_in(width, height, edges)
    pixels = np.random.default_rng(width).integers(0, 256, (height, width, 4), np.uint8)
    outs = np.zeros((2, side, side, 3), np.uint8)
    for is_portable in (False, True):
        kernel.resize(pixels, box, flip, outs[int(is_portable)], is_portable=is_portable)
    assert np.array_equal(outs[0], outs[1])
    image = Image.fromarray(pixels[:, :, :3])
    expected = np.asarray(image.resize((side, side), Image.Resampling.BILINEAR, box=box))
    found = outs[0, :, ::-1] if flip else outs[0]
    if goes_along_rows_first(width, height, side):
        assert np.array_equal(found, expected)
    else:
        assert np.abs(found.astype(int) - expected).max() <= 1


@settings(max_examples=200)
@given(
    st.sampled_from(KINDS),
    st.integers(1, 150),
    st.integers(1, 100),
    st.tuples(shares, shares, shares, shares),
)
def test_a_part_of_a_file_gives_pillows_pixels(
    kernel: NativeKernel,
    kind: Kind,
    width: int,
    height: int,
    edges: tuple[float, float, float, float],
) -> None:
    payload = jpeg(kind, width, height)
    box = box_in(width, height, edges)
    side = max(16, height)  # so that Pillow begins with the rows
    expected = scaled_by_pillow(payload, box, side)
    assert np.array_equal(decoded(kernel, payload, box, side), expected)
    assert np.array_equal(decoded(kernel, payload, box, side, flip=True), expected[:, ::-1])
    assert np.array_equal(decoded(kernel, kernel.remux(payload), box, side), expected)


def test_real_images_differ_from_pillow_by_little(kernel: NativeKernel, shared_data: Path) -> None:
    differences = []
    for path in sorted((shared_data / "imagenet-sample").glob("*.JPEG"))[::10]:
        payload = path.read_bytes()
        width, height = kernel.image_size(payload)
        box = (width * 0.21, height * 0.13, width * 0.83, height * 0.91)
        expected = scaled_by_pillow(payload, box, 299).astype(int)
        differences += [
            np.abs(decoded(kernel, content, box, 299) - expected).mean()
            for content in (payload, kernel.remux(payload))
        ]
    assert np.mean(differences) <= 0.05


@given(st.sampled_from(KINDS), st.booleans(), st.floats(0, 1))
def test_a_truncated_file_is_an_error_whatever_the_box(
    kernel: NativeKernel, kind: Kind, is_remuxed: bool, share: float
) -> None:
    payload = jpeg(kind, 90, 70)
    payload = kernel.remux(payload) if is_remuxed else payload
    cut = payload[: min(int(share * len(payload)), len(payload) - 1)]
    for box in ((0.0, 0.0, 90.0, 70.0), (0.0, 0.0, 9.0, 9.0)):
        with pytest.raises(DecodeError):
            decoded(kernel, cut, box, 16)
    for use in (kernel.check, kernel.remux):
        with pytest.raises(DecodeError):
            use(cut)


def test_missing_markers_are_noticed(kernel: NativeKernel) -> None:
    payload = kernel.remux(jpeg(Kind("420", subsampling=2), 128, 64))
    wrong = payload.replace(b"\xff\xd1", b"\xff\xd5", 1)
    assert payload != wrong
    with pytest.raises(DecodeError, match="truncated or corrupt"):
        decoded(kernel, wrong, (0, 0, 128, 64), 16)


def test_bytes_too_many_at_the_end_do_no_harm(kernel: NativeKernel) -> None:
    payload = jpeg(Kind("444"), 40, 30)
    for longer in (payload[:-2] + b"\0\0\xff\xd9", payload + b"\0" * 50):
        whole = (0.0, 0.0, 40.0, 30.0)
        expected = decoded(kernel, payload, whole, 32)
        assert np.array_equal(decoded(kernel, longer, whole, 32), expected)
        kernel.check(longer)


@pytest.mark.parametrize("kind", [KINDS[0], KINDS[5], KINDS[6]], ids=lambda kind: kind.name)
def test_a_file_too_short_for_its_size_is_refused_before_memory_is_taken(
    kernel: NativeKernel, kind: Kind
) -> None:
    payload = with_size(jpeg(kind, 40, 30), 7000, 8000)
    with pytest.raises(DecodeError, match="cannot hold 7000 x 8000 pixels"):
        decoded(kernel, payload, (0, 0, 10, 10), 16)


def test_a_file_of_endless_scans_is_refused(kernel: NativeKernel) -> None:
    kernel.check(with_many_scans(20))
    with pytest.raises(DecodeError, match="scans of 16 x 16 pixels"):
        kernel.check(with_many_scans(500))


@pytest.mark.parametrize(
    "box",
    [(-1.0, 0.0, 9.0, 9.0), (0.0, 0.0, 41.0, 9.0), (9.0, 0.0, 8.0, 9.0), (0.0, 0.0, 9.0, np.nan)],
)
def test_a_box_outside_the_image_is_refused(kernel: NativeKernel, box: Box) -> None:
    with pytest.raises(DecodeError, match="not inside the image"):
        decoded(kernel, jpeg(KINDS[0], 40, 30), box, 16)


def test_one_bad_image_of_a_batch_leaves_the_others_alone(kernel: NativeKernel) -> None:
    payloads = [jpeg(kind, 60, 40) for kind in KINDS]
    payloads[3] = payloads[3][:400]
    box = (3.5, 2.25, 50.0, 39.5)
    outs = np.zeros((len(payloads), 32, 32, 3), np.uint8)
    reasons = kernel.decode_batch(
        payloads, [box] * len(payloads), [False] * len(payloads), list(outs)
    )
    assert [number for number, reason in enumerate(reasons) if reason] == [3]
    for number, payload in enumerate(payloads):
        if number != 3:
            assert np.array_equal(outs[number], decoded(kernel, payload, box, 32))


def test_threads_do_not_disturb_one_another(kernel: NativeKernel) -> None:
    payloads = [jpeg(kind, 90, 60, seed=seed) for kind in KINDS for seed in range(3)]
    box = (3.5, 2.25, 80.0, 59.5)

    def decode(payload: bytes) -> bytes:
        return decoded(kernel, payload, box, 32).tobytes()

    with ThreadPoolExecutor(4) as executor:
        assert list(executor.map(decode, payloads * 4)) == list(map(decode, payloads)) * 4


def test_what_fuzzing_found_interesting_is_decoded_or_refused(kernel: NativeKernel) -> None:
    num_decoded = 0
    for payload in (path.read_bytes() for path in CORPUS):
        try:
            width, height = kernel.image_size(payload)
            remuxed = kernel.remux(payload)
        except DecodeError:
            continue
        box = (width / 3, height / 3, width / 1.5, height / 1.5)
        assert np.array_equal(decoded(kernel, payload, box, 24), decoded(kernel, remuxed, box, 24))
        num_decoded += 1
    assert 0 < num_decoded < len(CORPUS)


@pytest.mark.slow
def test_the_fuzzer_is_content_with_its_corpus(kernel: NativeKernel, tmp_path: Path) -> None:
    """Under the sanitizers; among its claims is that a re-muxed file decodes to the same pixels."""
    compiler = which("gcc")
    if compiler is None:
        pytest.skip(f"no gcc, though there is a kernel: {kernel.description()}")
    program = tmp_path / "fuzz"
    sources = [*NATIVE.glob("jpeg/*.c"), NATIVE / "fuzz" / "fuzz.c"]
    flags = ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
    subprocess.run([compiler, *flags, *sources, "-o", program, "-ljpeg", "-lm"], check=True)
    found = subprocess.run([program, *CORPUS], capture_output=True, text=True, check=False)
    assert not found.returncode, found.stderr


def test_a_library_that_cannot_be_used_is_said_to_be_so(tmp_path: Path) -> None:
    path = tmp_path / "datapipe_native.so"
    path.write_bytes(b"not a library")
    assert "cannot be loaded" in kernel_at(str(path)).detail
    compiler = which("gcc")
    if compiler is None:
        pytest.skip("no gcc")
    for source, reason in (
        ("int native_abi(void) { return 999; }", "has interface 999, these sources call"),
        ("int other(void) { return 1; }", "native_abi"),
    ):
        stale = tmp_path / f"{len(source)}.so"
        subprocess.run(
            [compiler, "-shared", "-fPIC", "-x", "c", "-", "-o", stale],
            input=source.encode(),
            check=True,
        )
        loaded = kernel_at(str(stale))
        assert loaded.kernel is None
        assert reason in loaded.detail


def test_a_jpeg_of_rgb_stays_rgb(kernel: NativeKernel) -> None:
    image = Image.open(BytesIO(jpeg(KINDS[0], 40, 30)))
    buffer = BytesIO()
    image.save(buffer, "JPEG", keep_rgb=True)
    payload = buffer.getvalue()
    box = (1.0, 2.0, 39.0, 29.0)
    expected = scaled_by_pillow(payload, box, 32)
    assert np.array_equal(decoded(kernel, payload, box, 32), expected)
    assert np.array_equal(decoded(kernel, kernel.remux(payload), box, 32), expected)
