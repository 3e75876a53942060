"""Storage: one kind of error for all backends, short reads, writes that are whole or absent."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from datapipe.errors import MissingIndex, MissingShard, UnreadableUrl
from datapipe.index import ShardIndex, ensure_index, index_shards, list_shards
from datapipe.labels import read_labels
from datapipe.range_reader import RangeReader
from datapipe.reader import SampleReader
from datapipe.retries import RetryPolicy
from datapipe.storage import (
    absolute,
    exists,
    names_in,
    read_bytes,
    read_range,
    replacing,
    size_of,
    within,
    write_bytes,
)
from tests.datapipe.file_server import FileServer
from tests.datapipe.small_sets import write_set

NUM_SAMPLES = 12


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A small set in two shards."""
    write_set(tmp_path / "set", num_samples=NUM_SAMPLES, samples_per_shard=8)
    return tmp_path / "set"


@pytest.fixture
def server(directory: Path) -> Iterator[FileServer]:
    """That set, served over HTTP."""
    with FileServer(directory) as server:
        yield server


def payloads(index: ShardIndex) -> list[bytes | None]:
    ranges = RangeReader(RetryPolicy(num_retries=1, first_wait_s=0.01))
    reader = SampleReader(index, block_size=4, max_blocks=9, ranges=ranges)
    samples = reader.fetch(np.arange(index.num_samples))
    return [None if sample.payload is None else bytes(sample.payload) for sample in samples]


def test_a_set_behind_http_is_read_by_its_own_index(server: FileServer, directory: Path) -> None:
    index = ShardIndex.open(ensure_index(server.url, index_directory="unused"))
    index.check_shards()
    assert payloads(index) == payloads(ShardIndex.open(str(directory)))


def test_shards_behind_http_are_indexed(
    server: FileServer, directory: Path, tmp_path: Path
) -> None:
    own = ShardIndex.open(str(directory))
    (directory / "index.json").unlink()
    url = ensure_index(server.url, index_directory=str(tmp_path / "index"))
    index = ShardIndex.open(url)
    assert index.fingerprint() == own.fingerprint()
    assert payloads(index) == payloads(own)


Operation = Callable[[str, Path], object]
OPERATIONS: dict[str, Operation] = {
    "index.json": lambda url, _: ShardIndex.open(url),
    "train-00000.parquet": lambda url, _: ShardIndex.open(url).table(0),
    "train-00000.tar": lambda url, _: payloads(ShardIndex.open(url)),
    "train-00001.tar": lambda url, path: index_shards(
        [f"{url}/train-00001.tar"], directory_url=str(path / "index")
    ),
    "train-00001.parquet": lambda url, _: exists(f"{url}/train-00001.parquet"),
    "labels.json": lambda url, _: read_labels(f"{url}/labels.json"),
    "": lambda url, _: list_shards(url),
}


@pytest.mark.parametrize("status", [403, 500])
@pytest.mark.parametrize("name", OPERATIONS)
def test_a_refused_read_names_url_and_status(
    server: FileServer, tmp_path: Path, name: str, status: int
) -> None:
    server.refused[name] = status
    with pytest.raises(UnreadableUrl, match=rf"{server.url}.*{name}: cannot be read: {status}"):
        OPERATIONS[name](server.url, tmp_path)


def test_what_is_not_there_is_missing_not_unreadable(server: FileServer, directory: Path) -> None:
    index = ShardIndex.open(server.url)
    (directory / "train-00000.tar").unlink()
    with pytest.raises(MissingShard, match=r"train-00000\.tar"):
        payloads(index)
    with pytest.raises(MissingIndex):
        ShardIndex.open(f"{server.url}/nowhere")
    with pytest.raises(FileNotFoundError):
        read_bytes(f"{server.url}/nowhere")


def test_a_truncated_shard_behind_http_costs_only_its_missing_samples(
    server: FileServer, directory: Path
) -> None:
    index = ShardIndex.open(server.url)
    whole = payloads(index)
    shard = directory / "train-00000.tar"
    shard.write_bytes(shard.read_bytes()[: index.table(0).offsets[2] + 5])
    assert payloads(index) == [*whole[:2], *[None] * 6, *whole[8:]]


@pytest.mark.parametrize("status", [403, 404])
def test_a_server_that_lists_nothing_is_asked_for_each_shard(
    status: int, directory: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with FileServer(directory) as server:
        server.refused[""] = status
        index = ShardIndex.open(ensure_index(server.url, index_directory=str(tmp_path)))
        index.check_shards()
        assert not caplog.records
        index_shards([index.shard_url(0)], directory_url=str(tmp_path))
        server.refused["train-00001.tar"] = 404
        with pytest.raises(MissingShard, match=r"1 shard is .*train-00001\.tar"):
            index.check_shards()


def test_a_server_without_ranges_is_refused(directory: Path) -> None:
    with FileServer(directory, ignores_ranges=True) as server:
        index = ShardIndex.open(server.url)
        with pytest.raises(UnreadableUrl, match="the server sends whole files instead of ranges"):
            payloads(index)


def test_a_server_that_does_not_answer_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as unused:
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/set"
    with pytest.raises(UnreadableUrl, match=f"{url}/index.json: cannot be read: "):
        ShardIndex.open(url)


def test_a_local_directory_that_cannot_be_listed_is_named() -> None:
    url = f"/{'x' * 300}"
    with pytest.raises(UnreadableUrl, match=r"cannot be read: .*File name too long"):
        names_in(url)


def test_a_file_is_there_or_not(tmp_path: Path) -> None:
    write_bytes(str(tmp_path / "empty"), b"")
    assert exists(str(tmp_path / "empty"))
    assert not exists(str(tmp_path / "other"))
    assert not exists(str(tmp_path / "empty" / "below a file"))
    assert names_in(str(tmp_path)) == {"empty"}
    assert names_in(str(tmp_path / "empty" / "below a file")) == set()


def test_a_range_is_shorter_where_the_file_ends(tmp_path: Path) -> None:
    for url in (str(tmp_path / "file"), "memory://ranges/file"):
        write_bytes(url, b"0123456789")
        assert size_of(url) == 10
        ranges = [read_range(url, *limits) for limits in ((2, 5), (8, 12), (10, 12), (40, 50))]
        assert ranges == [b"234", b"89", b"", b""]


def test_a_write_that_is_broken_off_leaves_what_was_there(tmp_path: Path) -> None:
    url = str(tmp_path / "file")
    write_bytes(url, b"old")

    def broken_off() -> None:
        with replacing(url) as file:
            file.write(b"new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        broken_off()
    assert read_bytes(url) == b"old"
    assert names_in(str(tmp_path)) == {"file"}


def test_a_write_that_storage_refuses_is_an_oserror(server: FileServer, tmp_path: Path) -> None:
    write_bytes(str(tmp_path / "file"), b"")
    with pytest.raises(FileExistsError):
        write_bytes(str(tmp_path / "file" / "below"), b"")
    with pytest.raises(OSError, match=f"{server.url}/new: "):
        write_bytes(f"{server.url}/new", b"")


def test_a_backend_that_blocks_is_given_up() -> None:
    answers = threading.Event()
    with pytest.raises(TimeoutError, match=r"no answer within 0\.05 s"):
        within(0.05, answers.wait)
    answers.set()
    assert within(10, answers.wait)
    with pytest.raises(ZeroDivisionError):
        within(10, lambda: 1 // 0)


def test_a_server_that_does_not_answer_in_time_is_given_up(server: FileServer) -> None:
    server.held.add("train-00000.tar")
    with pytest.raises(UnreadableUrl, match=r"train-00000\.tar: .* no answer within 0\.1 s"):
        read_range(f"{server.url}/train-00000.tar", 0, 10, timeout_s=0.1)


def test_a_range_that_an_index_makes_up_allocates_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"0123456789")
    for url in (str(tmp_path / "file"), f"file://{tmp_path}/file"):
        assert read_range(url, 2, 1 << 50) == b"23456789"


@pytest.mark.parametrize("protocol", ["file", "local"])
def test_a_url_of_this_machine_is_a_path(protocol: str, tmp_path: Path) -> None:
    assert absolute(f"{protocol}://{tmp_path}/set/") == f"{tmp_path}/set"
    assert absolute("memory://set/") == "memory://set"
