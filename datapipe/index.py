"""ShardIndex: the manifest of a data set, and the Parquet tables behind it.

The manifest `index.json` (`datapipe.manifest`) lies in the shards' directory, or elsewhere with
absolute shard URLs. A table's columns, and what the digest is of, are described in
`datapipe.table`. Samples are numbered through the shards.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from datapipe.errors import BadIndex, MissingIndex, MissingShard
from datapipe.listing import listed_sizes, without_unlisted
from datapipe.manifest import Manifest, ShardEntries, ShardEntry, read_manifest
from datapipe.range_reader import read_again
from datapipe.storage import (
    absolute,
    directory_of,
    exists,
    join,
    names_in,
    write_bytes,
)
from datapipe.table import ShardTable, read_table
from datapipe.table_making import MadeTable, TableJob, make_tables, shard_size

logger = logging.getLogger(__name__)

MANIFEST_NAME = "index.json"
UNFINISHED_NAME = "packing-unfinished"
"""The mark of a directory whose shards are still being written."""


class ShardIndex:
    """The shards of a data set. Small, picklable: tables are read when asked for, and not kept."""

    def __init__(self, directory: str, shards: Sequence[ShardEntry], *, num_labels: int) -> None:
        self.directory = directory
        self.shards = shards if isinstance(shards, ShardEntries) else ShardEntries.of(shards)
        self.num_labels = num_labels
        self._starts = np.zeros(len(shards) + 1, np.int64)
        np.cumsum(self.shards.nums_samples, out=self._starts[1:])

    @property
    def num_samples(self) -> int:
        return int(self._starts[-1])

    @staticmethod
    def open(url: str) -> ShardIndex:
        """The index at a directory or manifest URL.

        Errors: `MissingIndex`, `BadIndex`, `UnreadableUrl`.
        """
        manifest_url = _manifest_url(url)
        manifest = read_manifest(manifest_url)
        return ShardIndex(
            directory_of(manifest_url), manifest.entries, num_labels=manifest.num_labels
        )

    def shard_url(self, shard: int) -> str:
        return join(self.directory, self.shards.shards[shard])

    def table_url(self, shard: int) -> str:
        return join(self.directory, self.shards.indexes[shard])

    def table(self, shard: int) -> ShardTable:
        """Errors: `BadIndex`, also when its length or labels are not as the manifest says."""
        entry, url = self.shards[shard], self.table_url(shard)
        table = read_table(url)
        if table.num_samples != entry.num_samples:
            raise BadIndex(
                url, f"{table.num_samples} samples, the manifest says {entry.num_samples}"
            )
        labels = table.label_ids
        if labels.size and not 0 <= labels.min() <= labels.max() < self.num_labels:
            raise BadIndex(
                url,
                f"labels {labels.min()} to {labels.max()}, the manifest says {self.num_labels} "
                "labels",
            )
        return table

    def table_again(self, shard: int) -> ShardTable:
        """`table`, for those who have no retries of their own."""
        url = self.table_url(shard)
        return read_again(lambda: self.table(shard), url=url, what="table of samples")

    def locate(self, sample_ids: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The shard number of each sample, and its row in that shard's table."""
        shards = np.searchsorted(self._starts, sample_ids, side="right") - 1
        return shards, sample_ids - self._starts[shards]

    def fingerprint(self) -> str:
        """Differs where the samples or their order differ; the same wherever the shards lie."""
        shards = zip(self.shards.digests, self.shards.nums_samples, strict=True)
        digests = [digest for digest, num_samples in shards if num_samples]
        return hashlib.sha256(json.dumps([digests, self.num_labels]).encode()).hexdigest()

    def label_frequencies(self) -> NDArray[np.float64]:
        """The share of samples that carry each label: (num_labels,). Reads every table."""
        counts = np.zeros(self.num_labels, np.int64)
        for shard in range(len(self.shards)):
            label_ids = self.table_again(shard).label_ids
            counts += np.bincount(label_ids, minlength=self.num_labels)
        return counts / self.num_samples

    def check_shards(self) -> None:
        """Raise `MissingShard` naming every shard that is not there.

        This takes one listing a directory, and one request for each shard that a web server does
        not list. `UnreadableUrl` where storage answers neither.

        Shards of another size than the index says are named in a warning, as far as listings tell.
        """
        urls = [self.shard_url(number) for number in range(len(self.shards))]
        sizes = listed_sizes(urls)
        missing = without_unlisted([url for url in urls if url not in sizes])
        changed = [
            f"{url}: {sizes[url]} bytes, the index says {num_bytes}"
            for url, num_bytes in zip(urls, self.shards.nums_bytes, strict=True)
            if sizes.get(url) not in (None, num_bytes)
        ]
        if missing:
            raise MissingShard(tuple(missing))
        if changed:
            logger.warning(
                "shards are not as they were indexed shards=%d first=%s; samples that moved count "
                "as corrupt; see them with python -m datapipe verify",
                len(changed),
                changed[0],
            )


def index_shards(
    shard_urls: Sequence[str],
    *,
    directory_url: str,
    with_crc32: bool = False,
    num_processes: int = 1,
    on_table: Callable[[MadeTable], None] = lambda _: None,
) -> ShardIndex:
    """Walk existing shards and write their index into `directory_url`.

    Local shards are read by their headers, unless `with_crc32`; remote ones whole. Tables that are
    there, and newer than their shards, are kept: so an interrupted call goes on where it was.
    Shards of that directory are named relative to it, others by their absolute URL. `on_table` is
    called for each table. Errors: those of `walk_shard`; `MissingIndex` when no shard holds an
    image; `OSError`.
    """
    directory = absolute(directory_url)
    urls = [absolute(url) for url in shard_urls]
    tables = [f"{stem}.parquet" for stem in _unique_stems(urls)]
    jobs = [
        TableJob(url, join(directory, table), with_crc32)
        for url, table in zip(urls, tables, strict=True)
    ]
    _tell_remote_bytes([job.shard_url for job in jobs if job.is_remote])
    entries: dict[int, ShardEntry] = {}
    num_labels = 0
    for number, made in make_tables(jobs, num_processes=num_processes):
        for warning in made.warnings:
            logger.warning("%s", warning)
        facts = made.facts
        entries[number] = ShardEntry(
            facts.shard, tables[number], facts.num_samples, facts.shard_bytes, facts.digest
        )
        num_labels = max(num_labels, facts.num_labels)
        on_table(made)
    index = ShardIndex(directory, [entries[n] for n in range(len(urls))], num_labels=num_labels)
    if not index.num_samples:
        raise MissingIndex(directory_url, f"no image in {len(shard_urls)} shards")
    write_manifest(index)
    return index


def ensure_index(url: str, *, index_directory: str) -> str:
    """The manifest's URL: the data set's own, or one made in `index_directory` from its shards.

    url: of a manifest, of a directory with a manifest or shards, or of a single .tar shard. An
    index that was made before is taken again while the shards' names and sizes are the same.
    Errors: those of `list_shards` and `index_shards`.
    """
    if url.endswith(".json") or (not url.endswith(".tar") and exists(join(url, MANIFEST_NAME))):
        ShardIndex.open(url)
        return _manifest_url(absolute(url))
    shard_urls = list_shards(url)
    manifest_url = _manifest_url(absolute(index_directory))
    if not _is_index_of(manifest_url, shard_urls):
        logger.info("index is being made url=%s shards=%d", url, len(shard_urls))
        index_shards(shard_urls, directory_url=index_directory)
    return manifest_url


def list_shards(url: str) -> list[str]:
    """The absolute URLs of the *.tar files in a directory, by name, or of the one that `url` names.

    Raises `MissingIndex` when there are none, or when they are not all that are to be.
    """
    url = absolute(url)
    if url.endswith(".tar"):
        if not exists(url):
            raise MissingIndex(url, "there is no such shard")
        return [url]
    check_finished(url)
    names = sorted(name for name in names_in(url) if name.endswith(".tar"))
    if not names:
        raise MissingIndex(url, f"neither {MANIFEST_NAME} nor *.tar files are here")
    return [join(url, name) for name in names]


def check_finished(directory: str) -> None:
    """Raise `MissingIndex` if shards are being written there, or were when their writer ended."""
    if UNFINISHED_NAME in names_in(directory):
        raise MissingIndex(directory, "packing ended before the data set was complete")


def write_manifest(index: ShardIndex) -> None:
    manifest = Manifest(index.shards, index.num_labels)
    write_bytes(join(index.directory, MANIFEST_NAME), manifest.to_bytes())


def _is_index_of(manifest_url: str, shard_urls: Sequence[str]) -> bool:
    try:
        index = ShardIndex.open(manifest_url)
    except (MissingIndex, BadIndex):
        return False
    known = {index.shard_url(number): entry.bytes for number, entry in enumerate(index.shards)}
    sizes = listed_sizes(shard_urls)
    return known.keys() == set(shard_urls) and all(
        known[url] == (sizes.get(url) or shard_size(url)) for url in shard_urls
    )


def _tell_remote_bytes(urls: Sequence[str]) -> None:
    if not urls:
        return
    sizes = listed_sizes(urls)
    known = [sizes.get(url) for url in urls]
    logger.info(
        "remote shards are read whole, but those that were indexed before shards=%d bytes=%s",
        len(urls),
        "unknown" if None in known else f"{sum(size or 0 for size in known):,}",
    )


def _manifest_url(url: str) -> str:
    return url if url.endswith(".json") else join(url, MANIFEST_NAME)


def _unique_stems(urls: Sequence[str]) -> list[str]:
    """Names for the shards' tables: the shards' own, numbered where two shards share one."""
    stems = [url.rpartition("/")[2].removesuffix(".tar") for url in urls]
    counts = Counter(stems)
    return [
        stem if counts[stem] == 1 else f"{number:05d}-{stem}" for number, stem in enumerate(stems)
    ]
