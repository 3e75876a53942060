"""What a data set holds: counts, sizes, labels, and how many images carry restart markers."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from datapipe.errors import BadLabels
from datapipe.image_header import has_restart_markers
from datapipe.index import ShardIndex
from datapipe.labels import LABELS_NAME, read_labels
from datapipe.safe_text import printable, shortened
from datapipe.storage import exists, join, read_range
from datapipe.table import ShardTable

logger = logging.getLogger(__name__)

NUM_LABELS_SHOWN = 10
NUM_IMAGES_PROBED = 100
PROBE_BYTES = 1 << 16
LABEL_LENGTH = 40
DROPPED_BITS = 12
"""Of a float32's 23 bits of fraction; what stays tells a median apart to 1 in 2,000."""


@dataclass
class Distribution:
    """Smallest, median and largest of many positive numbers, in little memory."""

    smallest: int = 0
    largest: int = 0
    _counts: NDArray[np.int64] = field(
        default_factory=lambda: np.zeros(1 << (31 - DROPPED_BITS), np.int64)
    )

    def add(self, values: NDArray[np.int64]) -> None:
        if not values.size:
            return
        low, high = int(values.min()), int(values.max())
        self.smallest = min(self.smallest, low) if self.num_values else low
        self.largest = max(self.largest, high)
        buckets = values.astype(np.float32).view(np.uint32) >> DROPPED_BITS
        numbers, counts = np.unique(buckets, return_counts=True)
        self._counts[numbers] += counts

    @property
    def num_values(self) -> int:
        return int(self._counts.sum())

    def median(self) -> int:
        """Of an even number of values the lower one; exact to 1 in 2,000."""
        if not self.num_values:
            return 0
        bucket = np.searchsorted(np.cumsum(self._counts), (self.num_values + 1) // 2)
        edge = np.array([bucket << DROPPED_BITS], np.uint32).view(np.float32)[0]
        return max(self.smallest, int(edge))


@dataclass
class Summary:
    """What the tables of a data set say."""

    num_labels: int
    num_samples: int = 0
    num_unlabelled: int = 0
    num_unmeasured: int = 0
    num_unknown_crc32: int = 0
    label_counts: NDArray[np.int64] = field(init=False)
    bytes: Distribution = field(default_factory=Distribution)
    pixels: Distribution = field(default_factory=Distribution)

    def __post_init__(self) -> None:
        self.label_counts = np.zeros(self.num_labels, np.int64)

    def add(self, table: ShardTable) -> None:
        pixels = table.widths.astype(np.int64) * table.heights
        self.num_samples += table.num_samples
        self.num_unlabelled += int((~table.has_labels).sum())
        self.num_unmeasured += int((pixels <= 0).sum())
        self.num_unknown_crc32 += int((~table.has_crc32).sum())
        numbers, counts = np.unique(table.label_ids, return_counts=True)
        self.label_counts[numbers] += counts
        self.bytes.add(table.sizes)
        self.pixels.add(pixels[pixels > 0])


def summarize(index: ShardIndex, *, on_table: Callable[[], None]) -> Summary:
    """Reads every table; `on_table` is called after each. Errors: `BadIndex`, `UnreadableUrl`."""
    summary = Summary(index.num_labels)
    for shard in range(len(index.shards)):
        summary.add(index.table_again(shard))
        on_table()
    return summary


def label_names(index: ShardIndex) -> dict[int, str]:
    """From the labels.json beside the index, if there is one that can be read."""
    url = join(index.directory, LABELS_NAME)
    if not exists(url):
        return {}
    try:
        return {label.id: label.name for label in read_labels(url)}
    except BadLabels as error:
        logger.warning("labels are shown without names reason=%s", error)
        return {}


def share_with_restart_markers(index: ShardIndex, *, seed: int) -> tuple[int, int]:
    """How many of some images, drawn at random, have them; and how many these are."""
    generator = np.random.default_rng(seed)
    num_probed = min(NUM_IMAGES_PROBED, index.num_samples)
    ids = generator.choice(index.num_samples, num_probed, replace=False)
    shards, rows = index.locate(np.sort(ids))
    num_found = 0
    for shard in np.unique(shards).tolist():
        table, url = index.table(shard), index.shard_url(shard)
        for row in rows[shards == shard].tolist():
            start, size = int(table.offsets[row]), int(table.sizes[row])
            num_found += has_restart_markers(read_range(url, start, start + min(size, PROBE_BYTES)))
    return num_found, num_probed


def summary_lines(index: ShardIndex, summary: Summary, names: Mapping[int, str]) -> Iterator[str]:
    """As `info` prints them."""
    num_samples = summary.num_samples
    yield printable(index.directory)
    yield f"  shards       {len(index.shards):,}"
    yield f"  samples      {num_samples:,}"
    yield f"  labels       {index.num_labels:,}"
    yield f"  size         {sum(index.shards.nums_bytes) / 1e9:,.3f} GB"
    yield f"  image bytes  {_spread(summary.bytes)}"
    yield f"  pixels       {_spread(summary.pixels)}"
    yield f"  no label     {_share(summary.num_unlabelled, num_samples)}"
    yield f"  no size      {_share(summary.num_unmeasured, num_samples)}"
    yield f"  no crc32     {_share(summary.num_unknown_crc32, num_samples)}"
    order = np.argsort(-summary.label_counts, kind="stable")[:NUM_LABELS_SHOWN]
    counts = {label: int(summary.label_counts[label]) for label in order.tolist()}
    yield f"most frequent of {np.count_nonzero(summary.label_counts):,} labels that occur"
    for label, count in counts.items():
        if count:
            name = shortened(printable(names.get(label, "")), LABEL_LENGTH)
            bar = "#" * max(1, round(20 * count / max(counts.values())))
            yield f"  {label:>8}  {_share(count, num_samples):<22} {bar:<20}  {name}".rstrip()


def _spread(values: Distribution) -> str:
    return f"{values.smallest:,} to {values.largest:,}, median {values.median():,}"


def _share(count: int, total: int) -> str:
    return f"{count:,} ({count / total:.1%})"
