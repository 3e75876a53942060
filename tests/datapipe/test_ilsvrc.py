"""ILSVRC's two archives, laid out as they are downloaded, and every doubt about classes refused."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.io import savemat

from datapipe.errors import PackingError
from datapipe.ilsvrc import list_train, list_validation, read_ground_truth, read_meta
from datapipe.payloads import PayloadOptions
from tests.datapipe.small_sets import encode, picture

SYNSETS = ["n02119789", "n02100735", "n01440764"]
"""As the development kit numbers them: from 1, in no order of names."""


def tar_bytes(members: Mapping[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for name, payload in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(payload)
            tar.addfile(info, io.BytesIO(payload))
    return buffer.getvalue()


def jpeg(number: int) -> bytes:
    return encode(picture(number))


def class_tars() -> dict[str, dict[str, bytes]]:
    """What ILSVRC2012_img_train.tar holds, with its two kinds of odd files among the images."""
    return {
        "n01440764.tar": {f"n01440764_{i}.JPEG": jpeg(i) for i in (10026, 10027, 18)},
        "n02105855.tar": {"n02105855_2933.JPEG": encode(picture(1), "PNG")},
        "n02447366.tar": {"n02447366_23489.JPEG": encode(picture(2).convert("CMYK"))},
    }


def write_train(path: Path, tars: Mapping[str, Mapping[str, bytes]]) -> Path:
    path.write_bytes(tar_bytes({name: tar_bytes(images) for name, images in tars.items()}))
    return path


def test_the_images_of_the_tars_in_the_tar_are_read_in_place(tmp_path: Path) -> None:
    source = write_train(tmp_path / "ILSVRC2012_img_train.tar", class_tars())
    listing = list_train(source)
    expected = {
        f"{name.removesuffix('.tar')}/{image}": payload
        for name, images in class_tars().items()
        for image, payload in images.items()
    }
    assert {image.name: image.read() for image in listing.images} == expected
    assert [image.name for image in listing.images] == sorted(expected)
    assert all(image.labels == (image.name.split("/")[0],) for image in listing.images)
    assert {image.path for image in listing.images} == {source}
    for image in listing.images:
        PayloadOptions(restart_markers=False).apply(image.read())


def test_what_is_no_image_in_the_tars_is_counted(tmp_path: Path) -> None:
    tars: dict[str, dict[str, bytes]] = class_tars()
    tars["n01440764.tar"]["notes.txt"] = b"not an image"
    source = tmp_path / "train.tar"
    members = {name: tar_bytes(images) for name, images in tars.items()}
    source.write_bytes(tar_bytes({"README": b"", **members}))
    listing = list_train(source)
    assert len(listing.images) == 5
    assert listing.left_out == {"without extension": 1, ".txt": 1}


def test_a_train_archive_of_another_form_is_refused(tmp_path: Path) -> None:
    source = tmp_path / "train.tar"
    source.write_bytes(tar_bytes({"n01440764/n01440764_18.JPEG": jpeg(1)}))
    with pytest.raises(PackingError, match="holds no tar of a class, such as n01440764"):
        list_train(source)
    write_train(source, {"n01440764.tar": {"n02119789_1.JPEG": jpeg(1)}})
    with pytest.raises(PackingError, match=r"n02119789_1\.JPEG lies in n01440764\.tar"):
        list_train(source)
    with pytest.raises(PackingError, match=r"is no file; expected ILSVRC2012_img_train\.tar"):
        list_train(tmp_path)


def test_a_cut_download_is_refused(tmp_path: Path) -> None:
    whole = write_train(tmp_path / "train.tar", class_tars()).read_bytes()
    (tmp_path / "train.tar").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(PackingError, match=r"train\.tar: .*; download it again"):
        list_train(tmp_path / "train.tar")
    inner = tar_bytes(class_tars()["n01440764.tar"])
    members = {"n01440764.tar": inner.rstrip(b"\0") + bytes(200), "n02119789.tar": inner}
    (tmp_path / "train.tar").write_bytes(tar_bytes(members))
    with pytest.raises(PackingError, match=r"n01440764\.tar has no end at byte"):
        list_train(tmp_path / "train.tar")


def write_meta(path: Path, synsets: list[str] = SYNSETS, *, field: str = "ILSVRC2012_ID") -> Path:
    """meta.mat of the development kit: the classes, then what they are kinds of."""
    names = ["WNID", "words", "gloss", "num_children", "children", "wordnet_height"]
    rows: list[tuple[Any, ...]] = [
        (i, synset, f"word {i}", "gloss", 0, [], 0) for i, synset in enumerate(synsets, 1)
    ]
    rows.append((len(rows) + 1, "n00001740", "entity", "gloss", 2, [1, 2], 1))
    table = np.empty((len(rows), 1), dtype=[(name, object) for name in (field, *names)])
    for number, row in enumerate(rows):
        table[number, 0] = row
    savemat(path, {"synsets": table}, do_compression=True)
    return path


def write_validation(path: Path, numbers: list[int]) -> Path:
    members = {f"ILSVRC2012_val_{number:08d}.JPEG": jpeg(number) for number in numbers}
    path.write_bytes(tar_bytes(members))
    return path


def write_lines(path: Path, lines: list[Any]) -> Path:
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def test_the_numbers_of_the_development_kit_are_its_own(tmp_path: Path) -> None:
    ground_truth = write_lines(tmp_path / "ILSVRC2012_validation_ground_truth.txt", [3, 1, 3, 2])
    meta = write_meta(tmp_path / "meta.mat")
    assert read_meta(meta) == {1: SYNSETS[0], 2: SYNSETS[1], 3: SYNSETS[2]}
    source = write_validation(tmp_path / "ILSVRC2012_img_val.tar", [2, 1, 4, 3])
    listing = list_validation(source, ground_truth=ground_truth, meta=meta)
    assert [image.labels[0] for image in listing.images] == [SYNSETS[i] for i in (2, 0, 2, 1)]
    assert [image.read() for image in listing.images] == [jpeg(i) for i in (1, 2, 3, 4)]
    assert listing.images[0].short_name == "ILSVRC2012_val_00000001.JPEG"


def test_a_list_of_synsets_needs_no_meta_and_a_folder_does_as_well(tmp_path: Path) -> None:
    folder = tmp_path / "val"
    folder.mkdir()
    for number in (1, 2, 3):
        (folder / f"ILSVRC2012_val_{number:08d}.JPEG").write_bytes(jpeg(number))
    lines = write_lines(tmp_path / "labels.txt", [*SYNSETS])
    listing = list_validation(folder, ground_truth=lines, meta=None)
    assert [image.labels[0] for image in listing.images] == SYNSETS


@pytest.mark.parametrize(
    ("lines", "with_meta", "text"),
    [
        ([3, 1], False, "holds numbers, which are in no order of names; give --meta"),
        ([0, 1], True, "there is no class 0; .* has 1 to 3; a list that counts from 0 is of anoth"),
        ([4, 1], True, "there is no class 4; "),
        (SYNSETS, True, "holds synsets already; leave --meta out"),
        ([1, "n01440764"], True, "line 2 is 'n01440764'; allowed: an ILSVRC2012_ID a line"),
        (["tench", "goldfish"], False, "line 1 is 'tench'; allowed"),
        (["n01440764 tench"], False, "line 1 is 'n01440764 tench'; allowed"),
        ([1, "", 2], True, "line 2 is ''; allowed"),
        ([], False, "is empty; expected a line for each validation image"),
        (["\u00e9"], False, "cannot be read"),
    ],
)
def test_a_ground_truth_that_could_mean_two_things_is_refused(
    tmp_path: Path, lines: list[Any], with_meta: bool, text: str
) -> None:
    path = write_lines(tmp_path / "truth.txt", lines)
    meta = write_meta(tmp_path / "meta.mat") if with_meta else None
    with pytest.raises(PackingError, match=text):
        read_ground_truth(path, meta)


def test_a_missing_ground_truth_is_named(tmp_path: Path) -> None:
    with pytest.raises(PackingError, match=r"truth\.txt: cannot be read"):
        read_ground_truth(tmp_path / "truth.txt", None)


def test_a_meta_file_of_anything_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "meta.mat"
    with pytest.raises(PackingError, match=r"meta\.mat: not the meta\.mat of ILSVRC2012_devkit"):
        read_meta(path)
    for content in (b"", b"MATLAB 5.0 MAT-file" + bytes(200), b"1\n2\n"):
        path.write_bytes(content)
        with pytest.raises(PackingError, match=r"not the meta\.mat of ILSVRC2012_devkit"):
            read_meta(path)
    write_meta(path, field="ILSVRC2010_ID")
    with pytest.raises(PackingError, match=r"not the meta\.mat of ILSVRC2012_devkit"):
        read_meta(path)
    savemat(path, {"other": 3})
    with pytest.raises(PackingError, match=r"not the meta\.mat of ILSVRC2012_devkit"):
        read_meta(path)
    write_meta(path, ["n02119789", "tench"])
    with pytest.raises(PackingError, match=r"are not 1, 2, 3, .* of one synset each"):
        read_meta(path)


@pytest.mark.parametrize(
    ("numbers", "text"),
    [
        ([1, 3], "2 images, but 3 lines in .*; number 2 is missing; download the images again"),
        ([1, 2, 3, 4], r"ILSVRC2012_val_00000004\.JPEG has no line in .*, which has 3"),
        ([0, 1, 2], r"ILSVRC2012_val_00000000\.JPEG has no line in"),
    ],
)
def test_images_and_lines_that_do_not_belong_together_are_refused(
    tmp_path: Path, numbers: list[int], text: str
) -> None:
    source = write_validation(tmp_path / "val.tar", numbers)
    lines = write_lines(tmp_path / "labels.txt", [*SYNSETS])
    with pytest.raises(PackingError, match=text):
        list_validation(source, ground_truth=lines, meta=None)


def test_other_images_and_images_that_are_there_twice_are_refused(tmp_path: Path) -> None:
    lines = write_lines(tmp_path / "labels.txt", [*SYNSETS])
    source = tmp_path / "val.tar"
    source.write_bytes(tar_bytes({"n01440764/n01440764_18.JPEG": jpeg(1)}))
    with pytest.raises(PackingError, match=r"is no validation image; .* class needs no --recipe"):
        list_validation(source, ground_truth=lines, meta=None)
    names = ["1.JPEG", "2.JPEG", "3.JPEG"]
    members = {f"ILSVRC2012_val_0000000{name}": jpeg(1) for name in names}
    members["again/ILSVRC2012_val_00000001.JPEG"] = jpeg(1)
    source.write_bytes(tar_bytes(members))
    with pytest.raises(PackingError, match=r"4 images, but 3 lines in .*; some are there twice"):
        list_validation(source, ground_truth=lines, meta=None)
