"""The index: of our shards, of stock WebDataset's, and of broken ones."""

from __future__ import annotations

import gc
import io
import json
import pickle
import shutil
import tarfile
import warnings
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import webdataset

from datapipe.errors import BadIndex, MissingIndex, MissingShard, UnreadableShard, UnsupportedUrl
from datapipe.index import ShardIndex, ensure_index, index_shards
from datapipe.reader import RawSample, SampleReader
from datapipe.writer import write_shards
from tests.datapipe.small_sets import encode, labels_of, picture, raw_images, write_set


def read_all(index: ShardIndex) -> list[RawSample]:
    reader = SampleReader(index, block_size=8, max_blocks=2)
    return reader.fetch(np.arange(index.num_samples, dtype=np.int64))


def labels_in(index: ShardIndex) -> list[list[int] | None]:
    return [None if sample.labels is None else sample.labels.tolist() for sample in read_all(index)]


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, payload in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(payload)
            tar.addfile(info, io.BytesIO(payload))


def test_the_index_finds_every_sample_where_it_was_written(small_index: ShardIndex) -> None:
    index = ShardIndex.open(small_index.directory)
    assert (index.num_samples, index.num_labels) == (75, 10)
    assert [entry.num_samples for entry in index.shards] == [20, 20, 20, 15]
    for number, (sample, written) in enumerate(zip(read_all(index), raw_images(75), strict=True)):
        assert sample.payload is not None
        assert bytes(sample.payload) == written.payload
        assert sample.labels is not None
        assert tuple(sample.labels.tolist()) == labels_of(number)
        assert (sample.width, sample.height, sample.key) == (24, 20, f"{number:06d}")
        assert sample.problem() is None


def test_locate_gives_shard_and_row(small_index: ShardIndex) -> None:
    shards, rows = small_index.locate(np.array([0, 19, 20, 74]))
    assert shards.tolist() == [0, 0, 1, 3]
    assert rows.tolist() == [0, 19, 0, 14]


def test_the_index_is_small_to_send(small_index: ShardIndex) -> None:
    copy = pickle.loads(pickle.dumps(small_index))
    assert copy.shards == small_index.shards
    assert copy.table(3).keys == small_index.table(3).keys


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


def test_stock_webdataset_reads_our_shards(small_index: ShardIndex) -> None:
    urls = [small_index.shard_url(number) for number in range(len(small_index.shards))]
    dataset = webdataset.WebDataset(urls, shardshuffle=False).decode("rgb8").to_tuple("jpg", "json")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # webdataset leaves the shards open
        samples = list(dataset)
        del dataset
        gc.collect()
    assert [tuple(target["labels"]) for _, target in samples] == [labels_of(n) for n in range(75)]
    assert {image.shape for image, _ in samples} == {(20, 24, 3)}


def test_ensure_index_takes_the_data_sets_own(small_index: ShardIndex, tmp_path: Path) -> None:
    url = ensure_index(small_index.directory, index_directory=str(tmp_path / "unused"))
    assert url == f"{small_index.directory}/index.json"
    assert ensure_index(url, index_directory=str(tmp_path / "unused")) == url
    assert not (tmp_path / "unused").exists()


def test_an_index_made_before_is_taken_again_until_shards_change(
    small_index: ShardIndex, tmp_path: Path
) -> None:
    shards, out = tmp_path / "shards", tmp_path / "index"
    shards.mkdir()
    shutil.copy(small_index.shard_url(0), shards)
    url = ensure_index(str(shards), index_directory=str(out))
    made = Path(url).stat().st_mtime_ns
    ensure_index(str(shards), index_directory=str(out))
    assert Path(url).stat().st_mtime_ns == made
    shutil.copy(small_index.shard_url(1), shards)
    assert ShardIndex.open(ensure_index(str(shards), index_directory=str(out))).num_samples == 40


def test_members_of_a_sample_may_lie_apart(tmp_path: Path) -> None:
    images = {f"{number}.jpg": encode(picture(number)) for number in range(3)}
    labels = {f"{number}.cls": str(number).encode() for number in range(3)}
    write_tar(tmp_path / "a.tar", images | labels)
    index = index_shards([str(tmp_path / "a.tar")], directory_url=str(tmp_path))
    assert labels_in(index) == [[0], [1], [2]]


@pytest.mark.parametrize(
    "label", [b"", b"cat", b'{"labels": [-1]}', b'{"labels": [1.5]}', b"[" * 5000, b"{}"]
)
def test_a_sample_without_a_usable_label_is_known_as_such(tmp_path: Path, label: bytes) -> None:
    write_tar(tmp_path / "a.tar", {"0.jpg": encode(picture(0)), "0.json": label})
    index = index_shards([str(tmp_path / "a.tar")], directory_url=str(tmp_path))
    assert labels_in(index) == [None]
    assert read_all(index)[0].problem() == "it has no usable label"


def test_no_labels_is_a_usable_label(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", {"0.jpg": encode(picture(0)), "0.json": b'{"labels": []}'})
    index = index_shards([str(tmp_path / "a.tar")], directory_url=str(tmp_path))
    assert labels_in(index) == [[]]


def test_a_shard_that_ends_early_is_indexed_up_to_there(
    small_index: ShardIndex, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = Path(small_index.shard_url(0)).read_bytes()
    (tmp_path / "a.tar").write_bytes(whole[: small_index.table(0).offsets[12] + 10])
    index = index_shards([str(tmp_path / "a.tar")], directory_url=str(tmp_path))
    assert index.num_samples == 12
    assert "shard ends early" in caplog.text


def test_names_shared_by_shards_of_two_directories_do_not_collide(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_set(tmp_path / name, num_samples=3, samples_per_shard=None)
    urls = [str(tmp_path / name / "train-00000.tar") for name in ("one", "two")]
    index = index_shards(urls, directory_url=str(tmp_path / "index"))
    assert index.num_samples == 6
    assert [index.shard_url(number) for number in range(2)] == urls


def test_another_file_system_serves_as_well() -> None:
    index = write_memory_set()
    assert labels_in(ShardIndex.open("memory://bucket/set")) == labels_in(index)
    index.check_shards()
    fsspec.filesystem("memory").rm("/bucket/set/train-00000.tar")
    with pytest.raises(MissingShard, match=r"memory://bucket/set/train-00000\.tar"):
        index.check_shards()


def write_memory_set() -> ShardIndex:
    return write_shards(
        raw_images(4),
        directory="memory://bucket/set",
        labels=None,
        prefix="train",
        samples_per_shard=None,
        shard_bytes=None,
    )


def test_every_missing_shard_is_named(tmp_path: Path) -> None:
    index = write_set(tmp_path, num_samples=9, samples_per_shard=3)
    index.check_shards()
    (tmp_path / "train-00000.tar").unlink()
    (tmp_path / "train-00002.tar").unlink()
    with pytest.raises(MissingShard, match=r"2 shards are .*train-00000\.tar, .*train-00002\.tar"):
        index.check_shards()


@pytest.mark.parametrize("name", ["", "nowhere"])
def test_a_place_without_shards_says_so(tmp_path: Path, name: str) -> None:
    with pytest.raises(MissingIndex, match=r"neither index\.json nor \*\.tar files are here"):
        ensure_index(str(tmp_path / name), index_directory=str(tmp_path / "index"))
    with pytest.raises(MissingIndex, match="there is no such index"):
        ShardIndex.open(str(tmp_path / name))


def test_an_unknown_protocol_says_so() -> None:
    with pytest.raises(UnsupportedUrl, match="Protocol not known: s9"):
        ShardIndex.open("s9://bucket/set")


def test_what_is_no_tar_says_so(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(b"<html>404</html>" * 100)
    with pytest.raises(UnreadableShard, match="invalid header"):
        ensure_index(str(tmp_path), index_directory=str(tmp_path / "index"))


def test_two_images_of_one_name_are_refused(tmp_path: Path) -> None:
    image = encode(picture(0))
    write_tar(tmp_path / "a.tar", {"0.jpg": image, "0.png": image, "0.cls": b"1"})
    with pytest.raises(BadIndex, match="two images have the name '0'"):
        ensure_index(str(tmp_path), index_directory=str(tmp_path / "index"))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"format": "other"}, "not a datapipe-index"),
        ({"version": 2}, "version is 2, this release reads 1"),
        ({"num_samples": 7}, "the shards hold 3 samples, the manifest says 7"),
        ({"shards": [{"shard": "a.tar"}]}, "malformed"),
        ({"shards": 3}, "malformed"),
    ],
)
def test_a_manifest_of_another_form_is_refused(
    tmp_path: Path, change: dict[str, Any], text: str
) -> None:
    write_set(tmp_path, num_samples=3, samples_per_shard=None)
    manifest = json.loads((tmp_path / "index.json").read_text()) | change
    (tmp_path / "index.json").write_text(json.dumps(manifest))
    with pytest.raises(BadIndex, match=text):
        ShardIndex.open(str(tmp_path))


def test_a_table_of_another_length_or_none_is_refused(tmp_path: Path) -> None:
    index = write_set(tmp_path, num_samples=5, samples_per_shard=3)
    shutil.copy(tmp_path / "train-00000.parquet", tmp_path / "train-00001.parquet")
    with pytest.raises(BadIndex, match="3 samples, the manifest says 2"):
        index.table(1)
    (tmp_path / "train-00001.parquet").unlink()
    with pytest.raises(BadIndex, match="cannot be read"):
        index.table(1)
