"""How many images a second `python -m datapipe index` walks, on one core, page cache warm.

python -m tests.benchmarks.index --out /tmp/walk

Makes shards of made-up images in `--out`, of two sizes and in the forms of two writers: ours (pairs
of jpg and json) and stock webdataset's (jpg and cls, each with a pax header). Indexes each one
several times, with the compiled walk and with tarfile in turn. `open_s` is the time to open a
manifest of many shards. Its last line is one JSON object; `images_s` are medians by CPU time:
walking, digest and Parquet table, all in.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
import tyro
import webdataset
from PIL import Image
from rich.console import Console
from rich.table import Table

from datapipe.index import ShardIndex, write_manifest
from datapipe.manifest import ShardEntry
from datapipe.shard_walk import ShardContents, walk_shard, walk_with_tarfile
from datapipe.table import TableFacts, write_table

NUM_LABELS = 1000
SAMPLES_IN_A_SHARD = 10_000
"""Of the manifest that is only opened."""


@dataclass(frozen=True)
class Arguments:
    """The command line."""

    out: Path
    """Directory for the shards; some 1.1 GB, not removed."""
    images: int = 8_000
    """Images in a shard."""
    small_bytes: int = 1_000
    """Bytes of a small image."""
    large_bytes: int = 110_000
    """Bytes of a large one: the mean of ImageNet's."""
    repeats: int = 7
    """Walks of each shard by each way."""
    manifest_shards: int = 35_000
    """Shards of the manifest that is opened."""


@dataclass(frozen=True)
class Result:
    """One shard's figures."""

    shard: str
    images_s: float
    images_s_tarfile: float


def image_of(num_bytes: int) -> bytes:
    """A small JPEG, and zeros behind it: only the first bytes are looked at."""
    buffer = BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    Image.fromarray(noise).save(buffer, "JPEG")
    return buffer.getvalue().ljust(num_bytes, b"\0")


def write_shard(path: Path, *, num_images: int, num_bytes: int, is_ours: bool) -> None:
    image = image_of(num_bytes)
    with webdataset.TarWriter(str(path), encoder=False, mtime=0 if is_ours else None) as tar:
        for number in range(num_images):
            label = number % NUM_LABELS
            name = f"n{label:08d}/n{label:08d}_{number}.JPEG"
            ours = json.dumps({"labels": [label], "name": name}).encode()
            fields = {"json": ours} if is_ours else {"cls": b"%d" % label}
            tar.write({"__key__": f"{number:06d}", "jpg": image} | fields)


def images_a_second(walk: Callable[[], ShardContents], table_url: str) -> float:
    """All that indexing a shard takes, but for looking whether there is a table already."""
    start = time.process_time()
    entries = walk().entries
    facts = TableFacts.of(entries, shard="a.tar", shard_bytes=0)
    write_table(table_url, entries, facts=facts)
    return len(entries) / (time.process_time() - start)


def measured(path: Path, repeats: int) -> Result:
    url, table_url = str(path), str(path.with_suffix(".parquet"))
    fast, slow = [], []
    walk_with_tarfile(url, with_crc32=True)  # for the page cache
    for _ in range(repeats):
        fast.append(images_a_second(lambda: walk_shard(url, with_crc32=False), table_url))
        slow.append(images_a_second(lambda: walk_with_tarfile(url, with_crc32=False), table_url))
    return Result(path.stem, statistics.median(fast), statistics.median(slow))


def open_seconds(directory: Path, *, num_shards: int, repeats: int) -> float:
    entries = [
        ShardEntry(f"{n:05d}.tar", f"{n:05d}.parquet", SAMPLES_IN_A_SHARD, 1 << 30, f"{n:064x}")
        for n in range(num_shards)
    ]
    write_manifest(ShardIndex(str(directory), entries, num_labels=NUM_LABELS))
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        ShardIndex.open(str(directory))
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def main() -> None:
    arguments = tyro.cli(Arguments, description=__doc__)
    arguments.out.mkdir(parents=True, exist_ok=True)
    results = []
    for size, num_bytes in (
        ("small", arguments.small_bytes),
        ("large", arguments.large_bytes),
    ):
        for writer in ("ours", "webdataset"):
            path = arguments.out / f"{size}-{writer}.tar"
            write_shard(
                path, num_images=arguments.images, num_bytes=num_bytes, is_ours=writer == "ours"
            )
            results.append(measured(path, arguments.repeats))
    open_s = open_seconds(
        arguments.out, num_shards=arguments.manifest_shards, repeats=arguments.repeats
    )
    table = Table("shard", "images/s", "images/s by tarfile", title="walked on one core")
    for result in results:
        table.add_row(result.shard, f"{result.images_s:,.0f}", f"{result.images_s_tarfile:,.0f}")
    Console(stderr=True).print(table)
    figures = {"walks": [asdict(result) for result in results], "open_s": round(open_s, 3)}
    sys.stdout.write(f"{json.dumps(figures)}\n")


if __name__ == "__main__":
    main()
