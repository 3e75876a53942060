"""ShardIndex: the manifest of a data set, and the Parquet tables behind it.

The manifest `index.json` lies in the shards' directory, or elsewhere with absolute shard URLs:

    {"format": "datapipe-index", "version": 1, "num_samples": N, "num_labels": largest label id + 1,
     "shards": [{"shard": "train-00000.tar", "index": "train-00000.parquet", "num_samples": n,
                 "bytes": size of the shard, "digest": SHA-256 of its samples}, ...]}

Readers ignore any other field. A table's columns, and what the digest is of, are described in
`datapipe.table`. Samples are numbered through the shards.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from datapipe.errors import BadIndex, MissingIndex, MissingShard
from datapipe.storage import (
    absolute,
    directory_of,
    exists,
    join,
    names_in,
    read_bytes,
    size_of,
    write_bytes,
)
from datapipe.table import ShardTable, digest_of, read_table, write_table
from datapipe.tar_walk import walk_shard

logger = logging.getLogger(__name__)

MANIFEST_NAME = "index.json"
UNFINISHED_NAME = "packing-unfinished"
"""The mark of a directory whose shards are still being written."""
FORMAT, VERSION = "datapipe-index", 1


@dataclass(frozen=True)
class ShardEntry:
    """One line of the manifest; URLs are relative to it or absolute."""

    shard: str
    index: str
    num_samples: int
    bytes: int
    digest: str


class ShardIndex:
    """The shards of a data set. Small, picklable: tables are read when asked for, and not kept."""

    def __init__(self, directory: str, shards: Sequence[ShardEntry], *, num_labels: int) -> None:
        self.directory = directory
        self.shards = tuple(shards)
        self.num_labels = num_labels
        counts = [entry.num_samples for entry in self.shards]
        self._starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)

    @property
    def num_samples(self) -> int:
        return int(self._starts[-1])

    @staticmethod
    def open(url: str) -> ShardIndex:
        """The index at a directory or manifest URL.

        Errors: `MissingIndex`, `BadIndex`, `UnreadableUrl`.
        """
        manifest_url = _manifest_url(url)
        try:
            manifest = json.loads(read_bytes(manifest_url))
        except (FileNotFoundError, NotADirectoryError) as error:
            raise MissingIndex(manifest_url, "there is no such index") from error
        except ValueError as error:
            raise BadIndex(manifest_url, f"cannot be read: {error}") from error
        return _parse(manifest, manifest_url)

    def shard_url(self, shard: int) -> str:
        return join(self.directory, self.shards[shard].shard)

    def table(self, shard: int) -> ShardTable:
        """Errors: `BadIndex`, also when the table's length is not the manifest's."""
        entry = self.shards[shard]
        url = join(self.directory, entry.index)
        table = read_table(url)
        if table.num_samples != entry.num_samples:
            raise BadIndex(
                url, f"{table.num_samples} samples, the manifest says {entry.num_samples}"
            )
        return table

    def locate(self, sample_ids: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The shard number of each sample, and its row in that shard's table."""
        shards = np.searchsorted(self._starts, sample_ids, side="right") - 1
        return shards, sample_ids - self._starts[shards]

    def fingerprint(self) -> str:
        """Differs where the samples or their order differ; the same wherever the shards lie."""
        digests = [entry.digest for entry in self.shards if entry.num_samples]
        return hashlib.sha256(json.dumps([digests, self.num_labels]).encode()).hexdigest()

    def label_frequencies(self) -> NDArray[np.float64]:
        """The share of samples that carry each label: (num_labels,). Reads every table."""
        counts = np.zeros(self.num_labels, np.int64)
        for shard in range(len(self.shards)):
            counts += np.bincount(self.table(shard).label_ids, minlength=self.num_labels)
        return counts / self.num_samples

    def check_shards(self) -> None:
        """Raise `MissingShard` naming every shard that is not there: one listing a directory."""
        urls = [self.shard_url(number) for number in range(len(self.shards))]
        names = {
            directory: names_in(directory) for directory in {directory_of(url) for url in urls}
        }
        missing = [url for url in urls if url.rpartition("/")[2] not in names[directory_of(url)]]
        if missing:
            raise MissingShard(tuple(missing))


def index_shards(shard_urls: Sequence[str], *, directory_url: str) -> ShardIndex:
    """Read existing shards from end to end and write their index into `directory_url`.

    Shards of that directory are named relative to it, others by their absolute URL. Errors: those
    of `walk_shard`; `MissingIndex` when no shard holds an image; `OSError`.
    """
    directory = absolute(directory_url)
    entries = []
    num_labels = 0
    for shard_url, stem in zip(shard_urls, _unique_stems(shard_urls), strict=True):
        url = absolute(shard_url)
        samples = walk_shard(url)
        if not samples:
            logger.warning("shard holds no image shard=%s", url)
        name = url.rpartition("/")[2] if directory_of(url) == directory else url
        table = f"{stem}.parquet"
        write_table(join(directory, table), samples)
        entries.append(ShardEntry(name, table, len(samples), _shard_size(url), digest_of(samples)))
        labels = [label for sample in samples for label in sample.labels or ()]
        num_labels = max([num_labels, *(label + 1 for label in labels)])
    index = ShardIndex(directory, entries, num_labels=num_labels)
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
    if url.endswith(".json") or (not url.endswith(".tar") and MANIFEST_NAME in names_in(url)):
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
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "num_samples": index.num_samples,
        "num_labels": index.num_labels,
        "shards": [asdict(entry) for entry in index.shards],
    }
    write_bytes(join(index.directory, MANIFEST_NAME), json.dumps(manifest, indent=1).encode())


def _parse(manifest: Any, url: str) -> ShardIndex:
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise BadIndex(url, f"not a {FORMAT}")
    if manifest.get("version") != VERSION:
        raise BadIndex(url, f"version is {manifest.get('version')!r}, this release reads {VERSION}")
    try:
        entries = [
            ShardEntry(**{field.name: entry[field.name] for field in fields(ShardEntry)})
            for entry in manifest["shards"]
        ]
        index = ShardIndex(directory_of(url), entries, num_labels=int(manifest["num_labels"]))
        if index.num_samples != manifest["num_samples"] or not index.num_samples:
            raise BadIndex(
                url,
                f"the shards hold {index.num_samples} samples, "
                f"the manifest says {manifest['num_samples']}",
            )
    except (KeyError, TypeError, ValueError) as error:
        raise BadIndex(url, f"malformed: {error!r}") from error
    return index


def _is_index_of(manifest_url: str, shard_urls: Sequence[str]) -> bool:
    try:
        index = ShardIndex.open(manifest_url)
    except (MissingIndex, BadIndex):
        return False
    known = {index.shard_url(number): entry.bytes for number, entry in enumerate(index.shards)}
    return known == {url: _shard_size(url) for url in shard_urls}


def _manifest_url(url: str) -> str:
    return url if url.endswith(".json") else join(url, MANIFEST_NAME)


def _shard_size(url: str) -> int:
    try:
        return size_of(url)
    except FileNotFoundError as error:
        raise MissingShard((url,)) from error


def _unique_stems(urls: Sequence[str]) -> list[str]:
    """Names for the shards' tables: the shards' own, numbered where two shards share one."""
    stems = [url.rpartition("/")[2].removesuffix(".tar") for url in urls]
    counts = Counter(stems)
    return [
        stem if counts[stem] == 1 else f"{number:05d}-{stem}" for number, stem in enumerate(stems)
    ]
