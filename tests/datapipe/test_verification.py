"""verify: every kind of fault is found, named, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest

from datapipe.index import ShardIndex, index_shards
from datapipe.table import write_table
from datapipe.verification import verify
from tests.datapipe.small_sets import encode, labels_of, picture, write_set, write_tar
from tests.datapipe.test_table import rows


def faults_of(index: ShardIndex, *, is_deep: bool = False) -> list[str]:
    reports = verify(index, is_deep=is_deep, num_processes=1)
    return [str(fault) for report in reports for fault in report.faults]


def test_a_whole_set_has_no_faults(small_index: ShardIndex) -> None:
    reports = list(verify(small_index, is_deep=True, num_processes=2))
    assert sum(report.num_samples for report in reports) == 75
    assert not [fault for report in reports for fault in report.faults]
    assert sum(report.num_unknown_crc32 for report in reports) == 0


def test_a_truncated_shard_names_its_missing_samples(tmp_path: Path) -> None:
    index = write_set(tmp_path, num_samples=6, samples_per_shard=3)
    shard, table = tmp_path / "train-00001.tar", index.table(1)
    whole, cut = shard.stat().st_size, int(table.offsets[1]) + 40
    with shard.open("r+b") as file:
        file.truncate(cut)
    lost = "it is not in the shard, or comes after a place where that is damaged"
    assert faults_of(index) == [
        f"train-00001.tar: {cut:,} bytes, the index says {whole:,}",
        f"train-00001.tar: sample 000004 at byte {table.offsets[1]}: {lost}",
        f"train-00001.tar: sample 000005 at byte {table.offsets[2]}: {lost}",
    ]


def test_a_missing_shard_and_one_that_is_no_tar_are_faults(tmp_path: Path) -> None:
    index = write_set(tmp_path, num_samples=3, samples_per_shard=1)
    (tmp_path / "train-00000.tar").unlink()
    (tmp_path / "train-00001.tar").write_bytes(b"<html>" * 200)
    (tmp_path / "train-00002.parquet").unlink()
    faults = faults_of(index)
    assert faults[0] == "train-00000.tar: the shard is missing"
    assert "not a tar" in faults[1]
    assert "cannot be read" in faults[2]
    assert len(faults) == 3


def test_rows_that_differ_from_the_shard_are_faults(tmp_path: Path) -> None:
    index = write_set(tmp_path, num_samples=5, samples_per_shard=None)
    written = rows(index.table(0))
    moved = written[0]._replace(offset=written[0].offset + 512)
    relabelled = written[1]._replace(labels=(8,))
    changed = written[2]._replace(crc32=1)
    unlabelled = written[3]._replace(labels=None)
    write_table(index.table_url(0), [moved, relabelled, changed, unlabelled])
    first, *faults = faults_of(index)
    assert first == "train-00000.tar: its table has 4 samples, the manifest 5"
    reasons = [fault.split(": ", 2)[2] for fault in faults]
    size, offset = written[0].size, written[0].offset
    assert reasons == [
        f"it is {size} bytes at byte {offset}, the index says {size} bytes",
        f"its labels are {list(labels_of(1))}, the index says [8]",
        "its bytes are not those that were indexed (crc32 differs)",
        f"its labels are {list(labels_of(3))}, the index says none of use",
        "the index does not know this sample",
    ]


def test_a_manifest_of_fewer_labels_is_a_fault(tmp_path: Path) -> None:
    written = write_set(tmp_path, num_samples=5, samples_per_shard=None)
    index = ShardIndex(written.directory, written.shards, num_labels=9)
    assert faults_of(index) == ["train-00000.tar: its table has label 9, the manifest 9 labels"]


def test_a_sample_that_the_table_has_twice_is_a_fault(tmp_path: Path) -> None:
    index = write_set(tmp_path, num_samples=3, samples_per_shard=None)
    first, *others = rows(index.table(0))
    write_table(index.table_url(0), [first, first, *others[1:]])
    assert faults_of(index) == [
        "train-00000.tar: its table has 1 samples more than once, such as '000000'",
        f"train-00000.tar: sample 000001 at byte {others[0].offset}: the index does not know this "
        "sample",
    ]


@pytest.mark.parametrize("is_deep", [False, True])
def test_only_decoding_finds_an_image_that_was_packed_broken(tmp_path: Path, is_deep: bool) -> None:
    broken = encode(picture(1))[:300]
    write_tar(tmp_path / "a.tar", {"0.jpg": encode(picture(0)), "1.jpg": broken, "1.cls": b"1"})
    index = index_shards([str(tmp_path / "a.tar")], directory_url=str(tmp_path))
    faults = faults_of(index, is_deep=is_deep)
    assert len(faults) == is_deep
    assert all(fault.startswith("a.tar: sample 1 at byte ") for fault in faults)
