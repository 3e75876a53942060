"""Sources of images: nothing that is an image is lost, labelled wrongly or left out unsaid."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from datapipe.errors import PackingError
from datapipe.sources import Listing, list_images
from tests.datapipe.small_sets import encode, picture


def save(path: Path, number: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encode(picture(number)))
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two cats and a dog, in folders of their own."""
    for name in ("cat/0.jpg", "cat/1.jpg", "dog/0.JPEG"):
        save(tmp_path / "photos" / name, 0)
    return tmp_path / "photos"


def tar_of(folder: Path) -> Path:
    path = folder.with_suffix(".tar")
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        tar.add(folder, "photos")
    return path


def found(listing: Listing) -> list[str]:
    """Class and file of every image."""
    return [f"{image.labels[0]}/{image.name.rpartition('/')[2]}" for image in listing.images]


def test_links_in_a_folder_are_followed_but_never_in_a_circle(folder: Path, tmp_path: Path) -> None:
    elsewhere = save(tmp_path / "elsewhere" / "7.jpg", 1).parent
    for link, target in (
        ("emu", elsewhere),
        ("fox", elsewhere),
        ("dog/8.jpg", elsewhere / "7.jpg"),
        ("cat/circle", folder),
    ):
        (folder / link).symlink_to(target)
    expected = ["cat/0.jpg", "cat/1.jpg", "dog/0.JPEG", "dog/8.jpg", "emu/7.jpg", "fox/7.jpg"]
    assert found(list_images(folder)) == expected


def test_a_link_to_an_image_that_is_gone_is_not_passed_over(folder: Path, tmp_path: Path) -> None:
    (folder / "cat" / "2.jpg").symlink_to(tmp_path / "gone.jpg")
    image = list_images(folder).images[2]
    with pytest.raises(FileNotFoundError):
        image.read()


def test_hidden_files_and_folders_are_passed_over(folder: Path) -> None:
    save(folder / "cat" / ".ipynb_checkpoints" / "0-checkpoint.jpg", 1)
    save(folder / "cat" / "._0.jpg", 1)
    for source in (folder, tar_of(folder)):
        assert found(list_images(source)) == ["cat/0.jpg", "cat/1.jpg", "dog/0.JPEG"]


def test_other_files_are_counted_by_kind(folder: Path) -> None:
    for name in ("0.bmp", "1.bmp", "2.GIF", "notes.txt", "README"):
        save(folder / "emu" / name, 1)
    for source in (folder, tar_of(folder)):
        listing = list_images(source)
        assert len(listing.images) == 3
        assert listing.left_out == {".bmp": 2, ".gif": 1, ".txt": 1, "without extension": 1}
        assert listing.left_out_text().startswith("2 .bmp, 1 .")


def test_names_that_are_not_utf8_are_spelled_out(folder: Path) -> None:
    save(folder / "ca\udce9" / "0.jpg", 1)
    for source in (folder, tar_of(folder)):
        assert found(list_images(source))[0] == "ca\\xe9/0.jpg"


def test_a_tar_holds_what_would_be_extracted(tmp_path: Path) -> None:
    first, second = encode(picture(1)), encode(picture(2))
    with tarfile.open(tmp_path / "photos.tar", "w") as tar:
        for name, kind, content in (
            ("./cat/0.jpg", tarfile.REGTYPE, first),
            ("zebra/0.jpg", tarfile.LNKTYPE, "./cat/0.jpg"),
            ("zebra/1.jpg", tarfile.LNKTYPE, "zebra/0.jpg"),
            ("zebra/2.jpg", tarfile.LNKTYPE, "nowhere.jpg"),
            ("zebra/3.jpg", tarfile.SYMTYPE, "0.jpg"),
            ("cat/0.jpg", tarfile.REGTYPE, second),
        ):
            member = tarfile.TarInfo(name)
            member.type = kind
            if isinstance(content, bytes):
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
            else:
                member.linkname = content
                tar.addfile(member)
    listing = list_images(tmp_path / "photos.tar")
    assert found(listing) == ["cat/0.jpg", "zebra/0.jpg", "zebra/1.jpg"]
    assert [image.read() for image in listing.images] == [second, first, first]
    assert listing.left_out == {"links": 2}


@pytest.mark.parametrize("damage", ["cut", "damaged"])
def test_a_tar_without_its_end_is_refused(folder: Path, damage: str) -> None:
    path = tar_of(folder)
    with tarfile.open(path) as tar:
        last = tar.getmembers()[-1].offset
    content = path.read_bytes()
    rest = b"" if damage == "cut" else bytes([1]) * 512 + content[last + 512 :]
    path.write_bytes(content[:last] + rest)
    with pytest.raises(PackingError, match=f"neither a header nor the end of a tar at byte {last}"):
        list_images(path)


def test_a_source_without_images_says_what_it_holds(tmp_path: Path) -> None:
    save(tmp_path / "emu" / "0.bmp", 1)
    with pytest.raises(PackingError, match=r"holds no images; it holds 1 \.bmp; expected: <class>"):
        list_images(tmp_path)


def test_a_row_of_a_csv_file_is_named_by_its_number_in_the_file(folder: Path) -> None:
    table = folder / "table.CSV"
    table.write_text("path,labels\ncat/0.jpg,a\n,b\n")
    with pytest.raises(PackingError, match="row 3 of the file has no path"):
        list_images(table)
    table.write_text("path,labels\ncat/0.jpg,a\ncat/1.jpg,a\n./cat/0.jpg,b\n")
    twice = r"\./cat/0\.jpg is in row 2 of the file and again in row 4 of the file; put all labels"
    with pytest.raises(PackingError, match=twice):
        list_images(table)


def test_a_row_of_a_parquet_file_is_named_by_its_number(folder: Path) -> None:
    table = pa.table({"path": ["cat/0.jpg", None], "labels": ["a", "b"]})
    pq.write_table(table, folder / "table.parquet")
    with pytest.raises(PackingError, match="record 2 has no path"):
        list_images(folder / "table.parquet")
