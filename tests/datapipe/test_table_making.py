"""Indexing many shards: in parallel, and going on after an end."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import fsspec
import pytest

from datapipe.errors import UnreadableShard
from datapipe.index import ShardIndex, index_shards, list_shards
from datapipe.shard_jobs import for_each_shard
from datapipe.table import read_facts, write_table
from tests.datapipe.file_server import FileServer
from tests.datapipe.small_sets import encode, labels_in, labels_of, picture, write_tar


@pytest.fixture
def shards(small_index: ShardIndex, tmp_path: Path) -> Path:
    """The four shards of the small set, without their index."""
    directory = tmp_path / "shards"
    directory.mkdir()
    for number in range(len(small_index.shards)):
        shutil.copy(small_index.shard_url(number), directory)
    return directory


def make_index(directory: Path, *, num_processes: int = 1) -> tuple[ShardIndex, list[bool]]:
    """The index, and of each table whether it was kept."""
    kept: list[bool] = []
    index = index_shards(
        list_shards(str(directory)),
        directory_url=str(directory),
        num_processes=num_processes,
        on_table=lambda made: kept.append(made.is_kept),
    )
    return index, kept


def test_several_processes_make_the_same_index(shards: Path) -> None:
    index, kept = make_index(shards, num_processes=3)
    files = {path.name: path.read_bytes() for path in shards.iterdir()}
    assert kept == [False] * 4
    for path in shards.glob("*.parquet"):
        path.unlink()
    assert make_index(shards)[0].shards == index.shards
    assert files == {path.name: path.read_bytes() for path in shards.iterdir()}
    assert labels_in(index) == [list(labels_of(number)) for number in range(75)]


def test_after_an_error_only_what_is_missing_is_made(shards: Path) -> None:
    last = shards / "train-00003.tar"
    shard = last.read_bytes()
    last.write_bytes(b"no tar at all")
    for num_processes in (1, 2):
        with pytest.raises(UnreadableShard, match="train-00003"):
            make_index(shards, num_processes=num_processes)
    last.write_bytes(shard)
    assert make_index(shards)[1] == [True, True, True, False]


def as_old(table: Path) -> None:
    os.utime(table, (0, 0))


def as_of_a_smaller_shard(table: Path) -> None:
    shard = table.with_suffix(".tar")
    with shard.open("ab") as file:
        file.write(bytes(10240))
    os.utime(shard, (0, 0))


def of_another_shard(table: Path) -> None:
    shutil.copy(table.with_name("train-00001.parquet"), table)


def damaged(table: Path) -> None:
    table.write_bytes(table.read_bytes()[:-100])


def without_facts(table: Path) -> None:
    write_table(str(table), [])


@pytest.mark.parametrize(
    "change", [as_old, as_of_a_smaller_shard, of_another_shard, damaged, without_facts]
)
def test_a_table_that_may_not_be_of_this_shard_is_made_anew(
    shards: Path, change: Callable[[Path], None]
) -> None:
    digests = make_index(shards)[0].shards.digests
    change(shards / "train-00002.parquet")
    index, kept = make_index(shards)
    assert kept == [True, True, False, True]
    assert index.shards.digests == digests
    assert read_facts(index.table_url(2)) is not None


def test_a_table_of_a_shard_elsewhere_is_not_taken_for_one_of_the_same_name(
    tmp_path: Path,
) -> None:
    for number, folder in enumerate(("a", "b")):
        (tmp_path / folder).mkdir()
        payload = encode(picture(number)).ljust(1024, b"\0")
        write_tar(tmp_path / folder / "0.tar", {"0.jpg": payload, "0.cls": b"%d" % number})
    assert (tmp_path / "a/0.tar").stat().st_size == (tmp_path / "b/0.tar").stat().st_size
    for number, folder in enumerate(("a", "b")):
        shards = list_shards(str(tmp_path / folder))
        index = index_shards(shards, directory_url=str(tmp_path / "index"))
        assert labels_in(index) == [[number]]


def test_remote_shards_are_announced_and_read_whole(
    shards: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    num_bytes = (shards / "train-00000.tar").stat().st_size
    caplog.set_level("INFO")
    with FileServer(shards) as server:
        url = f"{server.url}/train-00000.tar"
        index = index_shards([url], directory_url=str(tmp_path / "index"))
    assert index.table(0).has_crc32.all()
    assert "remote shards are read whole" in caplog.text
    assert "bytes=unknown" in caplog.text or f"bytes={num_bytes:,}" in caplog.text


def test_shards_in_the_memory_of_this_process_are_indexed_in_it(shards: Path) -> None:
    fsspec.filesystem("memory").put(str(shards), "/walked", recursive=True)
    urls = list_shards("memory://walked")
    index = index_shards(urls, directory_url="memory://walked", num_processes=2)
    assert labels_in(index) == [list(labels_of(number)) for number in range(75)]


def test_a_process_that_was_killed_is_an_error_that_says_so() -> None:
    with pytest.raises(OSError, match="was killed, perhaps for want of memory"):
        list(for_each_shard(os._exit, [1, 1], num_processes=2))
