"""The index: of our shards, of stock WebDataset's, and of broken ones."""

from __future__ import annotations

import gc
import json
import pickle
import shutil
import warnings
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset

from datapipe.errors import BadIndex, MissingIndex, MissingShard, UnsupportedUrl
from datapipe.index import ShardIndex, ensure_index, index_shards, list_shards
from datapipe.writer import RawImage, write_shards
from tests.datapipe.small_sets import (
    encode,
    labels_in,
    labels_of,
    picture,
    raw_images,
    read_all,
    write_set,
    write_tar,
)

OF_ALL_SAMPLES = {"shard": "a", "index": "b", "num_samples": 1 << 63, "bytes": 1, "digest": "c"}


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


def test_the_largest_label_is_usable_and_counted(tmp_path: Path) -> None:
    images = [RawImage(encode(picture(0)), "jpg", (label,)) for label in (9_999_999, 3)]
    index = write_shards(
        images,
        directory=str(tmp_path),
        labels=None,
        prefix="train",
        samples_per_shard=1,
        shard_bytes=None,
    )
    assert index.num_labels == 10_000_000
    assert np.flatnonzero(index.label_frequencies()).tolist() == [3, 9_999_999]


def test_the_labels_of_all_shards_are_counted(tmp_path: Path) -> None:
    for name, label in (("a.tar", b"5"), ("b.tar", b"2")):
        write_tar(tmp_path / name, {"0.jpg": encode(picture(0)), "0.cls": label})
    index = ShardIndex.open(ensure_index(str(tmp_path), index_directory=str(tmp_path / "index")))
    assert index.num_labels == 6
    assert index.label_frequencies().tolist() == [0, 0, 0.5, 0, 0, 0.5]


def set_of(directory: Path, images: list[RawImage]) -> ShardIndex:
    return write_shards(
        images,
        directory=str(directory),
        labels=None,
        prefix="train",
        samples_per_shard=3,
        shard_bytes=None,
    )


def test_the_fingerprint_tells_samples_order_and_labels_apart(tmp_path: Path) -> None:
    images = raw_images(8)
    one_bit = bytes([*images[6].payload[:-3], images[6].payload[-3] ^ 1, *images[6].payload[-2:]])
    variants = {
        "same": images,
        "order in a shard": [images[1], images[0], *images[2:]],
        "order of shards": [*images[3:6], *images[:3], *images[6:]],
        "labels": [*images[:7], RawImage(images[7].payload, "jpg", images[6].label_ids)],
        "no labels": [RawImage(images[0].payload, "jpg", ()), *images[1:]],
        "one bit": [*images[:6], RawImage(one_bit, "jpg", images[6].label_ids), images[7]],
        "fewer": images[:7],
    }
    indexes = {name: set_of(tmp_path / name, images) for name, images in variants.items()}
    fingerprints = {name: index.fingerprint() for name, index in indexes.items()}
    assert len(set(fingerprints.values())) == len(variants)
    assert indexes["same"].fingerprint() == set_of(tmp_path / "again", images).fingerprint()
    urls = [indexes["same"].shard_url(number) for number in range(3)]
    forwards, backwards = (
        index_shards(order, directory_url=str(tmp_path / "index"), with_crc32=True)
        for order in (urls, urls[::-1])
    )
    assert forwards.fingerprint() == indexes["same"].fingerprint() != backwards.fingerprint()


def test_the_fingerprint_does_not_say_where_the_shards_lie(tmp_path: Path) -> None:
    index = set_of(tmp_path / "one", raw_images(8))
    (tmp_path / "two").mkdir()
    for number in range(3):
        shutil.copy(index.shard_url(number), tmp_path / "two" / f"moved-{number}.tar")
    write_tar(tmp_path / "two" / "moved-9.tar", {"readme.txt": b"no sample"})
    urls = list_shards(str(tmp_path / "two"))
    moved = index_shards(urls, directory_url=str(tmp_path / "index"), with_crc32=True)
    assert moved.fingerprint() == ShardIndex.open(index.directory).fingerprint()


def test_a_shard_without_images_is_kept_and_costs_nothing(
    small_index: ShardIndex, tmp_path: Path
) -> None:
    shards = tmp_path / "shards"
    shards.mkdir()
    for name in ("a", "c", "e"):
        write_tar(shards / f"{name}.tar", {} if name == "a" else {"0.txt": b"no image"})
    for name, number in (("b", 0), ("d", 3)):
        shutil.copy(small_index.shard_url(number), shards / f"{name}.tar")
    url = ensure_index(str(shards), index_directory=str(tmp_path / "index"))
    index = ShardIndex.open(url)
    assert [entry.num_samples for entry in index.shards] == [0, 20, 0, 15, 0]
    numbers = [*range(20), *range(60, 75)]
    assert labels_in(index) == [list(labels_of(number)) for number in numbers]
    assert index.label_frequencies().sum() == pytest.approx(2)
    made = Path(url).stat().st_mtime_ns
    ensure_index(str(shards), index_directory=str(tmp_path / "index"))
    assert Path(url).stat().st_mtime_ns == made


def test_shards_without_any_image_are_no_data_set(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", {"0.txt": b"no image"})
    with pytest.raises(MissingIndex, match="no image in 1 shards"):
        ensure_index(str(tmp_path), index_directory=str(tmp_path / "index"))


def test_a_single_shard_is_a_data_set(small_index: ShardIndex, tmp_path: Path) -> None:
    url = ensure_index(small_index.shard_url(3), index_directory=str(tmp_path / "index"))
    index = ShardIndex.open(url)
    assert labels_in(index) == [list(labels_of(number)) for number in range(60, 75)]
    assert index.shard_url(0) == small_index.shard_url(3)
    with pytest.raises(MissingIndex, match=r"nowhere\.tar: there is no such shard"):
        ensure_index(str(tmp_path / "nowhere.tar"), index_directory=str(tmp_path / "other"))


def test_a_link_to_a_shard_that_is_gone_is_named(small_index: ShardIndex, tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    shards.mkdir()
    shutil.copy(small_index.shard_url(0), tmp_path / "elsewhere.tar")
    (shards / "a.tar").symlink_to(tmp_path / "elsewhere.tar")
    ensure_index(str(shards), index_directory=str(tmp_path / "index"))
    (tmp_path / "elsewhere.tar").unlink()
    with pytest.raises(MissingShard, match=r"a\.tar"):
        ensure_index(str(shards), index_directory=str(tmp_path / "index"))
    with pytest.raises(MissingShard, match=r"a\.tar"):
        ensure_index(str(shards), index_directory=str(tmp_path / "another"))


def test_fields_and_columns_of_later_versions_are_ignored(tmp_path: Path) -> None:
    written = write_set(tmp_path, num_samples=3, samples_per_shard=None)
    manifest = json.loads((tmp_path / "index.json").read_text())
    manifest["made_by"] = manifest["shards"][0]["colour_space"] = "something new"
    (tmp_path / "index.json").write_text(json.dumps(manifest))
    table = pq.read_table(tmp_path / "train-00000.parquet")
    wider = table.add_column(0, "caption", pa.array(["new"] * 3))
    pq.write_table(wider, tmp_path / "train-00000.parquet")
    index = ShardIndex.open(str(tmp_path))
    assert index.fingerprint() == written.fingerprint()
    assert labels_in(index) == [list(labels_of(number)) for number in range(3)]


def test_a_table_without_a_column_is_refused(tmp_path: Path) -> None:
    index = write_set(tmp_path, num_samples=3, samples_per_shard=None)
    table = pq.read_table(tmp_path / "train-00000.parquet").drop_columns(["crc32", "labels"])
    pq.write_table(
        table.append_column("labels", pa.array(["x"] * 3)), tmp_path / "train-00000.parquet"
    )
    with pytest.raises(BadIndex, match=r"there is no column labels \(list<.*>\), crc32 \(uint32\)"):
        index.table(0)


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


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"format": "other"}, "not a datapipe-index"),
        ({"version": 2}, "version is 2, this release reads 1"),
        ({"num_labels": 10**12}, "1,000,000,000,000 labels; allowed: 10,000,000"),
        ({"shards": [OF_ALL_SAMPLES]}, "samples; allowed: 281,474,976,710,656"),
        ({"num_samples": 7}, "the shards hold 3 samples, the manifest says 7"),
        ({"shards": [{"shard": "a.tar"}]}, "malformed"),
        ({"shards": ["a.tar"]}, "malformed"),
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
