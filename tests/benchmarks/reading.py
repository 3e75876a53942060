"""What reading costs: samples from local shards, and pools from a server that is far away.

python -m tests.benchmarks.reading --images ../shared/data/imagenet-sample

Packs the images, repeated, into a temporary directory. Nothing is decoded. Its last line is one
JSON object: local_us_a_sample, local_mb_s (page cache warm); pool_latencies and
pool_latencies_1_thread (from asking for the first batch to having it, in latencies of the server,
its table read before); remote_samples_s and remote_samples_s_1_thread (an epoch from that server);
cached_samples_s (the epoch after it, from the cache on disk).
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import tyro

from datapipe.config import DataConfig
from datapipe.index import ShardIndex
from datapipe.order import SampleOrder
from datapipe.plan import leased_batches
from datapipe.planned_samples import PlannedSamples
from datapipe.position import Span
from datapipe.reader import SampleReader
from datapipe.writer import RawImage, write_shards
from tests.datapipe.file_server import FileServer


@dataclass(frozen=True)
class Arguments:
    """The command line."""

    images: Path
    """Directory of JPEGs."""
    samples: int = 2048
    """Samples of the set, the images repeated."""
    batch_size: int = 32
    """Samples of a batch."""
    latency_s: float = 0.05
    """After which the server answers."""


def pack(arguments: Arguments, directory: Path) -> None:
    """Shards of 512 samples."""
    payloads = [path.read_bytes() for path in sorted(arguments.images.iterdir()) if path.is_file()]
    write_shards(
        (RawImage(payloads[i % len(payloads)], "jpg", (0,)) for i in range(arguments.samples)),
        directory=str(directory),
        labels=None,
        prefix="train",
        samples_per_shard=512,
        shard_bytes=None,
    )


def read_epochs(url: str, arguments: Arguments, config: DataConfig, *, epochs: int) -> list[float]:
    """Seconds of each epoch, all samples fetched in order."""
    index = ShardIndex.open(url)
    order = SampleOrder(
        index.num_samples,
        block_size=config.block_size,
        blocks_per_pool=config.blocks_per_pool,
        seed=0,
    )
    samples = PlannedSamples(index, order, config)
    seconds = []
    for epoch in range(epochs):
        start = time.perf_counter()
        plans = leased_batches([Span(epoch, 0, order.num_samples)], batch_size=arguments.batch_size)
        assert sum(len(rows) for _, rows in samples.of_plans(plans)) >= order.num_samples
        seconds.append(time.perf_counter() - start)
    samples.close()
    return seconds


def pool_latencies(url: str, arguments: Arguments, *, num_threads: int) -> float:
    """From asking for a sample of each of seven blocks of a shard to having them."""
    index = ShardIndex.open(url)
    reader = SampleReader(index, block_size=64, max_blocks=None, num_threads=num_threads)
    reader.fetch(np.array([511]))
    start = time.perf_counter()
    reader.fetch(np.arange(0, 7 * 64, 64))
    seconds = time.perf_counter() - start
    reader.close()
    return seconds / arguments.latency_s


def main(arguments: Arguments) -> None:
    """Measure, and show it."""
    with tempfile.TemporaryDirectory() as name:
        shards = Path(name) / "shards"
        pack(arguments, shards)
        config = DataConfig(train=str(shards))
        local_s = min(read_epochs(str(shards), arguments, config, epochs=5)[1:])
        num_bytes = sum(path.stat().st_size for path in shards.glob("*.tar"))
        with FileServer(shards, latency_s=arguments.latency_s) as server:
            latencies = [
                pool_latencies(server.url, arguments, num_threads=number) for number in (1, 8)
            ]
            one = replace(config, read_threads=1)
            [one_s] = read_epochs(server.url, arguments, one, epochs=1)
            cached = replace(config, cache_dir=str(Path(name) / "cache"))
            [many_s, cached_s] = read_epochs(server.url, arguments, cached, epochs=2)
    values = {
        "local_us_a_sample": local_s / arguments.samples * 1e6,
        "local_mb_s": num_bytes / 1e6 / local_s,
        "pool_latencies_1_thread": latencies[0],
        "pool_latencies": latencies[1],
        "remote_samples_s_1_thread": arguments.samples / one_s,
        "remote_samples_s": arguments.samples / many_s,
        "cached_samples_s": arguments.samples / cached_s,
    }
    sys.stdout.write(json.dumps({name: round(value, 1) for name, value in values.items()}) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))
