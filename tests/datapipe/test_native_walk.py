"""The compiled walk finds what tarfile finds, or says that it will not do."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datapipe import native_walk
from datapipe.native_walk import OddArchive, Piece
from datapipe.shard_walk import walk_shard, walk_with_tarfile
from datapipe.tar_walk import fast_pieces, open_tar, tar_pieces
from tests.datapipe.small_sets import encode, picture, write_tar

pytestmark = pytest.mark.skipif(
    not native_walk.is_available(),
    reason="native/tar_walk.c is not built; pip install . builds it where there is a compiler",
)
IMAGES = [
    *(encode(picture(0, width=40 + n), kind) for n, kind in enumerate(("JPEG", "PNG", "WEBP"))),
    b"\xff\xd8" + b"\xff\xe1\xff\xff" + bytes(65533) + encode(picture(0))[2:],
    b"\xff\xd8" + b"\xff" * 5000,
    b"short",
    b"no image at all" * 9,
]
FORMATS: tuple[Literal[0, 1, 2], ...] = (0, 1, 2)
"""tarfile's: ustar, GNU, pax."""
KINDS = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE)


@dataclass(frozen=True)
class File:
    """A member to be written."""

    name: str
    content: bytes
    mtime: float
    kind: bytes
    archive_format: Literal[0, 1, 2]


bases = st.one_of(
    st.sampled_from(
        ["0", "1", "a b", "é", "\N{SNOWMAN}", "n" * 99, "dir/" * 40 + "x", "", "a/../b"]
    ),
    st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=6),
)
extensions = st.sampled_from(
    ["jpg", "JPG", "jpeg", "png", "webp", "cls", "Json", "json", "txt", "x.jpg", "jpg/", ""]
)
contents = st.one_of(
    st.sampled_from(IMAGES),
    st.sampled_from([b"7", b'{"labels": [1, 2], "name": "a/b.jpg"}', b"{}", b"x" * 6000]),
    st.binary(max_size=40),
)
files = st.builds(
    File,
    name=st.builds("{}.{}".format, bases, extensions),
    content=contents,
    mtime=st.sampled_from([0, 1.5, -1, 1e11]),
    kind=st.sampled_from([*KINDS, *[tarfile.REGTYPE] * 8]),
    archive_format=st.sampled_from(FORMATS),
)


def archive(members: list[File]) -> bytes:
    """A tar of them, each in a format of its own."""
    buffer = io.BytesIO()
    for file in members:
        info = tarfile.TarInfo(file.name)
        info.mtime, info.type = file.mtime, file.kind
        has_content = info.isreg()
        info.size = len(file.content) if has_content else 0
        try:
            buffer.write(info.tobuf(file.archive_format, "utf-8", "surrogateescape"))
        except ValueError:
            continue  # too long a name, or a time that this format cannot say
        if has_content:
            buffer.write(file.content + bytes(-len(file.content) % 512))
    return buffer.getvalue() + bytes(1024)


def by_kind(pieces: list[Piece]) -> list[Sequence[object]]:
    """The images, the labels and what was too large, each in their order."""
    images = [piece[:6] for piece in pieces if piece[1] >= 0]
    labels = [
        (key, extension, content) for key, *_, extension, content in pieces if content is not None
    ]
    too_large = [
        (key, extension) for key, *_, extension, content in pieces if extension and content is None
    ]
    return [images, labels, too_large]


def python_pieces(path: Path, *, with_crc32: bool = False) -> list[Piece]:
    with path.open("rb") as file, open_tar(file) as tar:
        return list(tar_pieces(tar, path.stat().st_size, with_crc32=with_crc32))


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("native") / "a.tar"


@given(members=st.lists(files, max_size=8))
@settings(max_examples=100)
def test_both_walks_find_the_same(path: Path, members: list[File]) -> None:
    path.write_bytes(archive(members))
    try:
        found = list(fast_pieces(path, with_crc32=False))
    except OddArchive:
        return
    assert by_kind(found) == by_kind(python_pieces(path))


@given(
    members=st.lists(files, min_size=1, max_size=4),
    place=st.floats(0, 1, exclude_max=True),
    field=st.sampled_from([0, 99, 100, 124, 135, 148, 156, 257, 345, 499, 512, 530]),
    change=st.binary(min_size=1, max_size=12),
    is_signed=st.booleans(),
    end=st.floats(0.1, 1.3),
)
@settings(max_examples=100)
def test_a_damaged_archive_is_odd_or_both_walks_find_the_same(
    path: Path,
    members: list[File],
    place: float,
    field: int,
    change: bytes,
    is_signed: bool,
    end: float,
) -> None:
    content = bytearray(archive(members))
    start = int(place * len(content)) // 512 * 512
    content[start + field : start + field + len(change)] = change
    if is_signed:  # a change that the checksum knows of
        header = content[start : start + 512]
        total = sum(header[:148]) + 8 * 32 + sum(header[156:])
        content[start + 148 : start + 156] = b"%06o\0 " % total
    path.write_bytes(content[: int(end * len(content))])
    try:
        found = list(fast_pieces(path, with_crc32=False))
    except OddArchive:
        return
    assert by_kind(found) == by_kind(python_pieces(path))


@pytest.mark.parametrize("archive_format", FORMATS)
def test_plain_archives_of_stock_tools_are_not_odd(
    path: Path, archive_format: Literal[0, 1, 2]
) -> None:
    members = [
        File(f"é/{number:06d}.{extension}", content, 1.5, tarfile.REGTYPE, archive_format)
        for number, image in enumerate(IMAGES)
        for extension, content in (("cls", b"%d" % number), ("jpg", image), ("txt", b"caption"))
    ]
    path.write_bytes(archive(members))
    found = list(fast_pieces(path, with_crc32=True))
    assert len(found) == len(IMAGES)
    assert by_kind(found) == by_kind(python_pieces(path, with_crc32=True))


def test_full_buffers_cut_no_sample_in_two(path: Path) -> None:
    label = b'{"labels": [3]}' + b" " * 500_000
    num_samples = native_walk.NUM_PIECES + 50
    members = {}
    for number in range(num_samples):
        members[f"{number}.jpg"] = b"x"
        members[f"{number}.json"] = label if number < 9 else b"[]"
    write_tar(path, members)
    found = list(fast_pieces(path, with_crc32=False))
    assert len(found) == num_samples
    assert {piece[7] is None for piece in found} == {False}
    assert by_kind(found) == by_kind(python_pieces(path))


def signed(header: bytes) -> bytes:
    """A header whose checksum fits."""
    total = sum(header[:148]) + 8 * 32 + sum(header[156:])
    return header[:148] + b"%06o\0 " % total + header[156:]


@pytest.mark.parametrize(
    ("archive_format", "size"),
    [(tarfile.PAX_FORMAT, b"00000\x8b01167\0"), (tarfile.GNU_FORMAT, b"00000000002\0")],
    ids=["of the file, which pax tells", "of a long name"],
)
def test_a_size_that_is_none_is_odd(path: Path, archive_format: Literal[1, 2], size: bytes) -> None:
    info = tarfile.TarInfo("long/" * 30 + "1.cls" if archive_format == 1 else "1.cls")
    info.size = 1
    info.pax_headers = {"size": "1"}
    header = info.tobuf(archive_format, "utf-8")
    place = len(header) - 512 if archive_format == 2 else 0
    header = (
        header[:place]
        + signed(header[place : place + 124] + size + header[place + 136 : place + 512])
        + header[place + 512 :]
    )
    path.write_bytes(header + b"7".ljust(512, b"\0") + bytes(1024))
    with pytest.raises(OddArchive):
        list(fast_pieces(path, with_crc32=False))


def test_an_odd_archive_is_walked_with_tarfile(path: Path) -> None:
    members = [
        File(f"{number}.jpg", encode(picture(0)), 0, tarfile.REGTYPE, 0) for number in range(3)
    ]
    path.write_bytes(archive(members)[:-1024])
    with pytest.raises(OddArchive):
        list(fast_pieces(path, with_crc32=False))
    contents = walk_shard(str(path), with_crc32=False)
    assert contents == walk_with_tarfile(str(path), with_crc32=False)
    assert [entry.key for entry in contents.entries] == ["0", "1", "2"]
    assert "shard ends early" in contents.warnings[0]
