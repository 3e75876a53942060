"""preview: pictures and their labels on one sheet."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from datapipe.index import ShardIndex, index_shards
from datapipe.preview import MARGIN, SIDE, contact_sheet
from tests.datapipe.small_sets import encode, picture, write_tar


def sheet_of(index: ShardIndex, *, num_images: int, seed: int = 0, name: str = "") -> Image.Image:
    names = dict.fromkeys(range(10), name)
    payload = contact_sheet(index, names, num_images=num_images, seed=seed)
    return Image.open(BytesIO(payload))


def test_a_picture_is_shown_as_it_is_with_text_below(tmp_path: Path) -> None:
    image = picture(3, width=SIDE + 80, height=SIDE)
    write_tar(tmp_path / "a.tar", {"0.png": encode(image, "PNG"), "0.cls": b"1"})
    index = index_shards([str(tmp_path / "a.tar")], directory_url=str(tmp_path))
    pixels = np.asarray(sheet_of(index, num_images=5))
    shown = pixels[MARGIN : MARGIN + SIDE, MARGIN : MARGIN + SIDE]
    assert np.array_equal(shown, np.asarray(image)[:, 40:-40])
    assert (pixels[MARGIN + SIDE :] == 0).any()


def test_the_seed_draws_the_images(small_index: ShardIndex) -> None:
    sheets = [
        np.asarray(sheet_of(small_index, num_images=9, seed=seed)).tobytes() for seed in (1, 1, 2)
    ]
    assert sheets[0] == sheets[1] != sheets[2]


def test_text_of_any_kind_stays_under_its_picture(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", {"0.jpg": encode(picture(0)), "0.cls": b"1"})
    index = index_shards([str(tmp_path / "a.tar")], directory_url=str(tmp_path))
    for name in ("<b>" * 200, "a\nb\x1b[0m\u202e\udce9", "\N{SNOWMAN}" * 50, ""):
        pixels = np.asarray(sheet_of(index, num_images=1, name=name))
        assert pixels.shape[1] == SIDE + 2 * MARGIN
        assert (pixels[:, SIDE + MARGIN :] == 255).all()


def test_what_cannot_be_used_is_shown_as_such(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", {"0.jpg": b"no image", "1.jpg": encode(picture(0))})
    index = index_shards([str(tmp_path / "a.tar")], directory_url=str(tmp_path), with_crc32=True)
    shard = bytearray((tmp_path / "a.tar").read_bytes())
    shard[int(index.table(0).offsets[1]) + 50] ^= 1
    (tmp_path / "a.tar").write_bytes(shard)
    pixels = np.asarray(sheet_of(index, num_images=2)).reshape(-1, 3)
    colours = {tuple(colour) for colour in np.unique(pixels, axis=0).tolist()}
    assert (0xB0, 0x00, 0x20) in colours
    assert (pixels == 255).all(axis=1).mean() > 0.9  # frames and text alone, no picture
