"""Reading over HTTP and from S3: faults that pass cost retries and nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from moto.server import ThreadedMotoServer
from s3fs import S3FileSystem

from datapipe.block_cache import BlockCache
from datapipe.errors import MissingShard, UnreadableUrl
from datapipe.index import ShardIndex
from datapipe.plan import leased_batches
from datapipe.planned_samples import PlannedSamples
from datapipe.position import Span
from datapipe.range_reader import RangeReader
from datapipe.reader import RawSample, SampleReader
from datapipe.retries import RetryPolicy
from datapipe.writer import write_shards
from tests.datapipe.fault_proxy import Fault, FaultProxy, one_in_five
from tests.datapipe.file_server import FileServer
from tests.datapipe.small_sets import raw_images, small_config, small_order, write_set

NUM_SAMPLES = 75
NUM_BLOCKS = 19
QUICK = RetryPolicy(num_retries=8, timeout_s=2.0, first_wait_s=0.01)
FAULTS = one_in_five(seed=3, num_requests=300, num_stalls=2)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """75 images in shards of 20, 20, 20 and 15."""
    directory = tmp_path_factory.mktemp("set")
    write_set(directory, num_samples=NUM_SAMPLES, samples_per_shard=20)
    return directory


@pytest.fixture
def files(directory: Path) -> Iterator[str]:
    """The URL of that set, behind HTTP."""
    with FileServer(directory) as server:
        yield server.url


@pytest.fixture
def s3_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An S3 endpoint over real HTTP, with a bucket `shards`, that s3:// stands for."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    S3FileSystem.clear_instance_cache()
    S3FileSystem().mkdir("shards")
    yield f"http://{host}:{port}"
    S3FileSystem.clear_instance_cache()
    server.stop()


def fetched(reader: SampleReader, num_samples: int = NUM_SAMPLES) -> list[RawSample]:
    """All samples, in an order that jumps from block to block."""
    return reader.fetch(np.random.default_rng(0).permutation(num_samples))


def assert_each_once(samples: list[RawSample]) -> None:
    written = raw_images(NUM_SAMPLES)
    assert sorted(sample.sample_id for sample in samples) == list(range(NUM_SAMPLES))
    for sample in samples:
        assert sample.payload is not None
        assert bytes(sample.payload) == written[sample.sample_id].payload


def test_every_sample_once_from_a_server_that_fails_one_request_in_five(files: str) -> None:
    with FaultProxy(files, FAULTS) as proxy:
        ranges = RangeReader(QUICK)
        reader = SampleReader(
            ShardIndex.open(proxy.url), block_size=4, max_blocks=5, num_threads=4, ranges=ranges
        )
        for _ in range(3):
            assert_each_once(fetched(reader))
        counters = reader.counters()
        reader.close()
    assert {"stall", "cut", "shorten", "refuse", "throttle"} == set(proxy.served)
    assert counters.num_retries == len(proxy.served)
    assert counters.num_reads >= 3 * NUM_BLOCKS


def test_training_from_s3_that_fails_one_request_in_five_reads_every_sample_once(
    s3_server: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    written = write_shards(
        raw_images(NUM_SAMPLES),
        directory="s3://shards/set",
        labels=None,
        prefix="train",
        samples_per_shard=20,
        shard_bytes=None,
    )
    S3FileSystem.clear_instance_cache()
    config = replace(
        small_config(written),
        read_threads=4,
        read_timeout_s=2.0,
        cache_dir=str(tmp_path / "cache"),
        cache_gb=0.001,
    )
    with FaultProxy(s3_server, FAULTS) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        index = ShardIndex.open("s3://shards/set")
        samples = PlannedSamples(index, small_order(index), config)
        for epoch in range(2):
            plans = leased_batches([Span(epoch, 0, NUM_SAMPLES)], batch_size=8)
            rows = [row for _, rows in samples.of_plans(plans) for row in rows]
            assert_each_once([row.sample for row in rows if row is not None])
        counters = samples.counters()
        samples.close()
    assert len(proxy.served) >= 3
    assert counters.num_retries == len(proxy.served)
    assert counters.num_reads == counters.num_cache_misses == NUM_BLOCKS
    assert counters.num_cache_hits == NUM_BLOCKS


def test_what_the_cache_holds_needs_no_server(files: str, directory: Path, tmp_path: Path) -> None:
    def ranges() -> RangeReader:
        return RangeReader(QUICK, cache=BlockCache(str(tmp_path), max_bytes=1_000_000))

    index = ShardIndex.open(files)
    first = SampleReader(index, block_size=20, max_blocks=None, ranges=ranges())
    assert_each_once(fetched(first))
    size = sum((directory / entry.shard).stat().st_size for entry in index.shards)
    counters = first.counters()
    assert (counters.num_reads, counters.num_cache_misses, counters.num_cache_hits) == (4, 4, 0)
    assert size * 0.8 < counters.bytes_read < size
    with FaultProxy(files, dict.fromkeys(range(10), "refuse")) as proxy:
        assert_each_once(
            fetched(SampleReader(index, block_size=20, max_blocks=None, ranges=(again := ranges())))
        )
    assert not proxy.served
    assert again.counters().num_cache_hits == 4
    assert again.counters().bytes_read == 0


@pytest.mark.parametrize("fault", ["refuse", "throttle", "stall", "cut", "shorten"])
def test_a_fault_that_does_not_pass_is_named_with_range_and_attempts(
    files: str, fault: Fault
) -> None:
    reasons: dict[Fault, str] = {
        "refuse": "503, message='Service Unavailable'",
        "throttle": "429, message='Too Many Requests'",
        "stall": r"no answer within 0\.2 s",
        "cut": "payload is not completed",
        "shorten": "the answer was cut short: 4",
    }
    policy = RetryPolicy(num_retries=2, timeout_s=0.2 if fault == "stall" else 20, first_wait_s=0.0)
    with FaultProxy(files, dict.fromkeys(range(3), fault)) as proxy:
        index = ShardIndex.open(proxy.url)
        first = index.table(0).offsets[0]
        reader = SampleReader(index, block_size=4, max_blocks=1, ranges=RangeReader(policy))
        with pytest.raises(
            UnreadableUrl,
            match=rf"{proxy.url}/train-00000\.tar: cannot be read: (?s:.*){reasons[fault]}.*"
            rf"\(bytes {first} to \d+, 3 attempts\)",
        ):
            reader.fetch(np.arange(4))
        assert reader.counters().num_retries == 2
        assert reader.fetch(np.arange(4))[0].problem() is None  # a later fetch tries anew
        reader.close()


def test_what_is_missing_or_forbidden_is_not_tried_again(directory: Path) -> None:
    with FileServer(directory) as server:
        index = ShardIndex.open(server.url)
        reader = SampleReader(index, block_size=20, max_blocks=1)
        server.refused |= {"train-00000.tar": 403, "train-00001.tar": 404}
        with pytest.raises(UnreadableUrl, match=r"403.*1 attempt\)"):
            reader.fetch(np.arange(4))
        with pytest.raises(MissingShard, match=r"train-00001\.tar"):
            reader.fetch(np.arange(20, 24))
        assert reader.counters().num_retries == 0


def test_the_table_of_a_shard_is_read_again_too(directory: Path) -> None:
    with FileServer(directory) as server:
        index = ShardIndex.open(server.url)
        server.refused["train-00000.parquet"] = 503
        policy = RetryPolicy(num_retries=1, first_wait_s=0.0)
        reader = SampleReader(index, block_size=4, max_blocks=1, ranges=RangeReader(policy))
        with pytest.raises(UnreadableUrl, match=r"parquet: .*503.*\(table of samples, 2 attempts"):
            reader.fetch(np.arange(4))
        del server.refused["train-00000.parquet"]
        assert reader.fetch(np.arange(4))[0].problem() is None


def test_an_index_that_is_opened_and_counted_is_read_again_too(files: str) -> None:
    faults: dict[int, Fault] = dict.fromkeys((0, 2, 4), "refuse")
    with FaultProxy(files, faults, everywhere=True) as proxy:
        index = ShardIndex.open(proxy.url)
        assert index.label_frequencies().sum() == 2
    assert proxy.served == ["refuse"] * 3


def test_a_table_that_does_not_come_is_named(directory: Path) -> None:
    with FileServer(directory) as server:
        index = ShardIndex.open(server.url)
        server.held.add("train-00000.parquet")
        policy = RetryPolicy(num_retries=1, timeout_s=0.1, first_wait_s=0.0)
        reader = SampleReader(index, block_size=4, max_blocks=1, ranges=RangeReader(policy))
        with pytest.raises(
            UnreadableUrl, match=r"00000\.parquet: .*no answer within 0\.1 s.*samples, 2 attempts"
        ):
            reader.fetch(np.arange(4))


def test_the_blocks_of_a_pool_are_read_at_the_same_time(files: str) -> None:
    """The server answers no request before three are there; a pool is three blocks."""
    with FaultProxy(files, gather=3) as proxy:
        index = ShardIndex.open(proxy.url)
        config = replace(small_config(index), read_threads=3, read_timeout_s=20.0)
        samples = PlannedSamples(index, small_order(index), config)
        pool = small_order(index).pool_at(0, 30)
        plans = leased_batches([pool], batch_size=2)
        _, rows = next(samples.of_plans(plans))
        assert all(row is not None and row.sample.problem() is None for row in rows)
        samples.close()
