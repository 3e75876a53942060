"""Walking shards: those of stock tools, damaged ones, and what a sample may consist of."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
import webdataset
from hypothesis import given
from hypothesis import strategies as st

from datapipe.errors import BadIndex, UnreadableShard
from datapipe.index import ShardIndex, ensure_index, index_shards
from datapipe.shard_walk import walk_shard, walk_with_tarfile
from datapipe.table import LARGEST_LABEL
from tests.datapipe.small_sets import encode, labels_in, picture, read_all, write_tar


@pytest.mark.parametrize(
    "sample",
    [
        {"jpg": "image", "cls": b"4"},
        {"jpeg": "image", "json": json.dumps({"labels": [4]}).encode()},
        {"jpeg": "image", "json": json.dumps({"label": 4, "caption": "x"}).encode()},
        {"jpg": "image", "cls": b"4", "json": b'{"caption": "x"}'},
        {"png": "image", "json": json.dumps({"cls": 4}).encode(), "pyd": b"never unpickled"},
    ],
    ids=["jpg-cls", "jpeg-labels", "jpeg-label", "jpg-cls-json", "png-cls"],
)
def test_shards_of_stock_webdataset_are_indexed(tmp_path: Path, sample: dict[str, Any]) -> None:
    shards, out = tmp_path / "shards", tmp_path / "index"
    shards.mkdir()
    for shard in range(2):
        with webdataset.TarWriter(str(shards / f"set-{shard}.tar"), encoder=False) as tar:
            for number in range(5):
                image = encode(picture(number), "PNG" if "png" in sample else "JPEG")
                members = {
                    key: image if value == "image" else value for key, value in sample.items()
                }
                tar.write({"__key__": f"dir/{shard}-{number}"} | members)
    index = ShardIndex.open(ensure_index(str(shards), index_directory=str(out)))
    assert labels_in(index) == [[4]] * 10
    assert index.num_labels == 5
    assert sorted(path.name for path in shards.iterdir()) == ["set-0.tar", "set-1.tar"]


def test_members_of_a_sample_may_lie_apart(tmp_path: Path) -> None:
    images = {f"{number}.jpg": encode(picture(number)) for number in range(3)}
    labels = {f"{number}.cls": str(number).encode() for number in range(3)}
    write_tar(tmp_path / "a.tar", images | labels)
    index = index_shards([str(tmp_path / "a.tar")], directory_url=str(tmp_path))
    assert labels_in(index) == [[0], [1], [2]]


@pytest.mark.parametrize(
    "label",
    [
        b"",
        b"cat",
        b'{"labels": [-1]}',
        b'{"labels": [1.5]}',
        b"[" * 5000,
        b"{}",
        b'{"labels": [10000000]}',
        b'{"labels": [1099511627776]}',
        b'{"labels": [0]}' + b" " * (1 << 20),
    ],
    ids=["none", "name", "negative", "real", "deep", "empty", "large", "huge", "long"],
)
def test_a_sample_without_a_usable_label_is_known_as_such(
    tmp_path: Path, label: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    write_tar(tmp_path / "a.tar", {"0.jpg": encode(picture(0)), "0.json": label})
    index = index_shards([str(tmp_path / "a.tar")], directory_url=str(tmp_path))
    assert labels_in(index) == [None]
    assert index.num_labels == 0
    allowed = "it has no usable label (allowed: ids from 0 to 9,999,999)"
    assert read_all(index)[0].problem() == allowed
    assert "samples have no usable label" in caplog.text


def test_no_labels_is_a_usable_label(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", {"0.jpg": encode(picture(0)), "0.json": b'{"labels": []}'})
    index = index_shards([str(tmp_path / "a.tar")], directory_url=str(tmp_path))
    assert labels_in(index) == [[]]


@pytest.mark.parametrize(
    ("cut", "damaged"),
    [(10, 0), (0, 0), (-512, 0), (-200, 0), (None, 512)],
    ids=["in the data", "before the data", "before a header", "in a header", "header damaged"],
)
def test_a_shard_that_ends_early_is_indexed_up_to_there(
    small_index: ShardIndex,
    tmp_path: Path,
    cut: int | None,
    damaged: int,
    caplog: pytest.LogCaptureFixture,
) -> None:
    shard = bytearray(Path(small_index.shard_url(0)).read_bytes())
    start = int(small_index.table(0).offsets[12])
    shard[start - damaged : start] = bytes([1]) * damaged
    (tmp_path / "a.tar").write_bytes(shard if cut is None else shard[: start + cut])
    index = index_shards([str(tmp_path / "a.tar")], directory_url=str(tmp_path))
    assert index.num_samples == 12
    assert "shard ends early" in caplog.text


def test_a_whole_shard_gives_no_warning(
    small_index: ShardIndex, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    index_shards([small_index.shard_url(0)], directory_url=str(tmp_path))
    assert not caplog.records


def test_only_files_of_a_size_that_fits_are_read(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, kind in (("0.jpg", tarfile.REGTYPE), ("1.jpg", tarfile.SYMTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "0.jpg"
            info.size = len(encode(picture(0))) if kind == tarfile.REGTYPE else 0
            tar.addfile(info, io.BytesIO(encode(picture(0))))
        for name, kind in (("2.jpg", tarfile.DIRTYPE), ("3.jpg", tarfile.FIFOTYPE)):
            info = tarfile.TarInfo(name)
            info.type = kind
            tar.addfile(info)
        huge = tarfile.TarInfo("4.jpg")
        huge.size = (1 << 28) + 1
        tar.addfile(huge)  # without its bytes: a hole in the file
        start = tar.offset
    with (tmp_path / "a.tar").open("r+b") as file:
        file.truncate(start + 512 * (huge.size // 512 + 1) + 1024)
    index = index_shards([str(tmp_path / "a.tar")], directory_url=str(tmp_path))
    assert index.table(0).keys == ["0"]


def test_a_name_that_is_not_utf8_is_spelled_out(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        for name, payload in (("caf\udce9.jpg", encode(picture(0))), ("caf\udce9.cls", b"1")):
            info = tarfile.TarInfo(name)
            info.size = len(payload)
            tar.addfile(info, io.BytesIO(payload))
    index = index_shards([str(tmp_path / "a.tar")], directory_url=str(tmp_path))
    assert index.table(0).keys == ["caf\\xe9"]
    assert labels_in(index) == [[1]]


def test_what_is_no_tar_says_so(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(b"<html>404</html>" * 100)
    with pytest.raises(UnreadableShard, match="invalid header"):
        ensure_index(str(tmp_path), index_directory=str(tmp_path / "index"))


def test_two_images_of_one_name_are_refused(tmp_path: Path) -> None:
    image = encode(picture(0))
    write_tar(tmp_path / "a.tar", {"0.jpg": image, "0.png": image, "0.cls": b"1"})
    with pytest.raises(BadIndex, match="two images have the name '0'"):
        ensure_index(str(tmp_path), index_directory=str(tmp_path / "index"))


@pytest.mark.parametrize("with_crc32", [False, True])
def test_the_compiled_walk_and_the_slow_one_find_the_same(
    small_index: ShardIndex, with_crc32: bool
) -> None:
    url = small_index.shard_url(0)
    contents = walk_shard(url, with_crc32=with_crc32)
    assert contents == walk_with_tarfile(url, with_crc32=with_crc32)
    assert {entry.crc32 is not None for entry in contents.entries} == {with_crc32}
    assert [entry._replace(crc32=0) for entry in contents.entries] == [
        entry._replace(crc32=0) for entry in walk_with_tarfile(url, with_crc32=True).entries
    ]


@given(
    labels=st.lists(st.integers(-2, 10_000_002) | st.floats() | st.text(), max_size=3),
    name=st.none() | st.text(max_size=8),
    separators=st.sampled_from([None, (",", ":")]),
    extension=st.sampled_from(["json", "cls"]),
)
def test_labels_are_what_json_says(
    path: Path,
    labels: list[object],
    name: str | None,
    separators: tuple[str, str] | None,
    extension: str,
) -> None:
    value = {"labels": labels} | ({} if name is None else {"name": name})
    content = json.dumps(value, separators=separators).encode()
    write_tar(path, {"0.jpg": b"x", f"0.{extension}": content})
    (entry,) = walk_shard(str(path), with_crc32=False).entries
    usable = all(type(label) is int and 0 <= label <= LARGEST_LABEL for label in labels)
    known = tuple(dict.fromkeys(labels)) if usable and extension == "json" else None
    assert entry.labels == known
    assert entry.name == name


@given(content=st.from_regex(r"\A[0-9]{0,9}\n?\Z"))
def test_a_class_number_is_what_json_says(path: Path, content: str) -> None:
    write_tar(path, {"0.jpg": b"x", "0.cls": content.encode()})
    (entry,) = walk_shard(str(path), with_crc32=False).entries
    try:
        number = json.loads(content)
    except ValueError:
        number = None
    usable = number is not None and number <= LARGEST_LABEL
    assert entry.labels == ((number,) if usable else None)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("walk") / "a.tar"
