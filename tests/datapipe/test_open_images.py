"""Open Images: what people found on an image becomes its labels, and nothing else."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from datapipe.errors import PackingError
from datapipe.open_images import list_open_images, read_descriptions
from tests.datapipe.small_sets import encode, picture

HEADER = "ImageID,Source,LabelName,Confidence"
LABELS = f"""{HEADER}
0001eeaf4aed83f9,verification,/m/0cmf2,1
0001eeaf4aed83f9,verification,/m/014sv8,0
0004886b7d043cfd,crowdsource-verification,/m/04hgtk,0
000595fe6fee6369,verification,/m/04hgtk,1
000595fe6fee6369,verification,/m/0cmf2,1
000595fe6fee6369,crowdsource-verification,/m/0cmf2,1
1234567890123456,verification,/m/0cmf2,1
00075905539074f2,verification,/m/0cmf2,1
"""
DESCRIPTIONS = '/m/0cmf2,Airplane\n/m/04hgtk,"Head, human"\n/m/014sv8,Human eye\n'


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Five images; one with labels that it has not, one without any line."""
    images = ("0001eeaf4aed83f9", "0004886b7d043cfd", "000595fe6fee6369", "1234567890123456")
    for number, image_id in enumerate((*images, "00ffffffffffffff")):
        path = tmp_path / "images" / f"{image_id}.jpg"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(encode(picture(number)))
    return tmp_path / "images"


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_verified_labels_are_those_with_confidence_1(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    labels = write(tmp_path / "labels.csv", LABELS)
    with caplog.at_level(logging.WARNING):
        listing = list_open_images(folder, image_labels=labels, descriptions=None)
    assert {image.name: image.labels for image in listing.images} == {
        "0001eeaf4aed83f9.jpg": ("/m/0cmf2",),
        "000595fe6fee6369.jpg": ("/m/04hgtk", "/m/0cmf2"),
        "1234567890123456.jpg": ("/m/0cmf2",),
    }
    assert listing.left_out_text() == "2 without a verified label"
    assert "labelled images are not in the folder images=1" in caplog.text


@pytest.mark.parametrize("header", ["", "LabelName,DisplayName\n"])
def test_descriptions_are_added_to_the_names(folder: Path, tmp_path: Path, header: str) -> None:
    labels = write(tmp_path / "labels.csv", LABELS)
    descriptions = write(tmp_path / "class-descriptions.csv", header + DESCRIPTIONS)
    listing = list_open_images(folder, image_labels=labels, descriptions=descriptions)
    assert listing.images[1].labels == ("/m/04hgtk Head, human", "/m/0cmf2 Airplane")


def test_a_label_without_description_is_named(folder: Path, tmp_path: Path) -> None:
    labels = write(tmp_path / "labels.csv", LABELS)
    descriptions = write(tmp_path / "names.csv", "/m/04hgtk,Head\n")
    with pytest.raises(PackingError, match=r"not in .*names\.csv: '/m/0cmf2'; it has 1 entries"):
        list_open_images(folder, image_labels=labels, descriptions=descriptions)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (f"{HEADER}\n0001eeaf4aed83f9,machine,/m/0cmf2,0.7\n", "Confidence of 0.7, so these label"),
        (f"{HEADER}\n0001eeaf4aed83f9,verification,/m/0cmf2,\n", "Confidence of nan"),
        (f"{HEADER}\n0001eeaf4aed83f9,verification,/m/0cmf2,yes\n", "cannot be read: .*'yes'"),
        (f"{HEADER}\n0001eeaf4aed83f9,verification\n", "cannot be read: .*columns"),
        ("ImageID,LabelName\n0001eeaf4aed83f9,/m/0cmf2\n", "cannot be read: .*'Confidence'"),
        ("", "cannot be read: .*[Ee]mpty.*; expected the columns ImageID,Source,LabelName"),
        (f"{HEADER}\n00075905539074f2,verification,/m/0cmf2,1\n", "says of no image in .* what is"),
    ],
)
def test_labels_of_another_form_are_refused(
    folder: Path, tmp_path: Path, text: str, reason: str
) -> None:
    labels = write(tmp_path / "labels.csv", text)
    with pytest.raises(PackingError, match=reason):
        list_open_images(folder, image_labels=labels, descriptions=None)


@pytest.mark.parametrize("content", [b"/m/0cmf2\n", b"/m/0cmf2,a,b\n", b"\xff\xfe"])
def test_descriptions_of_another_form_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "names.csv").write_bytes(content)
    with pytest.raises(PackingError, match=r"names\.csv: (.* is no line of|cannot be read)"):
        read_descriptions(tmp_path / "names.csv")


def test_a_missing_file_is_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(PackingError, match=r"labels\.csv: cannot be read"):
        list_open_images(folder, image_labels=tmp_path / "labels.csv", descriptions=None)
    with pytest.raises(PackingError, match=r"names\.csv: cannot be read"):
        read_descriptions(tmp_path / "names.csv")


def test_an_image_that_is_there_twice_is_refused(folder: Path, tmp_path: Path) -> None:
    (folder / "again").mkdir()
    (folder / "again" / "0001eeaf4aed83f9.jpg").write_bytes(encode(picture(0)))
    labels = write(tmp_path / "labels.csv", LABELS)
    twice = r"image 0001eeaf4aed83f9 is there as 0001eeaf4aed83f9\.jpg and as again/"
    with pytest.raises(PackingError, match=twice):
        list_open_images(folder, image_labels=labels, descriptions=None)


def test_a_tar_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PackingError, match="is no folder; expected a folder of <ImageID>"):
        list_open_images(tmp_path / "0.tar", image_labels=tmp_path, descriptions=None)
