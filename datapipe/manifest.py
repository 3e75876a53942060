"""index.json: the shards of a data set, one line each.

    {"format": "datapipe-index", "version": 1, "num_samples": N, "num_labels": largest label id + 1,
     "shards": [{"shard": "train-00000.tar", "index": "train-00000.parquet", "num_samples": n,
                 "bytes": size of the shard, "digest": SHA-256 of its samples}, ...]}

Readers ignore any other field. Shards and tables are named relative to it or absolutely.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, overload

from datapipe.errors import BadIndex, MissingIndex
from datapipe.json_text import parse_json
from datapipe.range_reader import read_again
from datapipe.storage import read_bytes
from datapipe.table import LARGEST_LABEL

FORMAT, VERSION = "datapipe-index", 1
MOST_SAMPLES = 1 << 48
"""Of a data set: its sample numbers, and sums of them, fit into 64 bits."""


@dataclass(frozen=True)
class ShardEntry:
    """One line of the manifest; URLs are relative to it or absolute."""

    shard: str
    index: str
    num_samples: int
    bytes: int
    digest: str


@dataclass(frozen=True)
class ShardEntries(Sequence[ShardEntry]):
    """The lines of a manifest, kept as columns: a set may have many ten thousand shards."""

    shards: list[str]
    indexes: list[str]
    nums_samples: list[int]
    nums_bytes: list[int]
    digests: list[str]

    @staticmethod
    def of(entries: Iterable[ShardEntry]) -> ShardEntries:
        rows = [
            (entry.shard, entry.index, entry.num_samples, entry.bytes, entry.digest)
            for entry in entries
        ]
        return ShardEntries(*map(list, zip(*rows, strict=True))) if rows else ShardEntries.none()

    @staticmethod
    def none() -> ShardEntries:
        return ShardEntries([], [], [], [], [])

    def __len__(self) -> int:
        return len(self.shards)

    @overload
    def __getitem__(self, number: int) -> ShardEntry: ...
    @overload
    def __getitem__(self, number: slice) -> list[ShardEntry]: ...
    def __getitem__(self, number: int | slice) -> ShardEntry | list[ShardEntry]:
        if isinstance(number, slice):
            return [self[place] for place in range(*number.indices(len(self)))]
        return ShardEntry(
            self.shards[number],
            self.indexes[number],
            self.nums_samples[number],
            self.nums_bytes[number],
            self.digests[number],
        )


@dataclass(frozen=True)
class Manifest:
    """What an index.json says."""

    entries: ShardEntries
    num_labels: int

    def to_bytes(self) -> bytes:
        """One line a shard."""
        fields = {
            "format": FORMAT,
            "version": VERSION,
            "num_samples": sum(self.entries.nums_samples),
            "num_labels": self.num_labels,
        }
        start = json.dumps(fields).removesuffix("}")
        lines = ",\n".join(json.dumps(asdict(entry)) for entry in self.entries)
        return f'{start}, "shards": [\n{lines}\n]}}\n'.encode()


def read_manifest(url: str) -> Manifest:
    """Errors: `MissingIndex`, `BadIndex`, `UnreadableUrl`."""
    try:
        manifest = parse_json(read_again(lambda: read_bytes(url), url=url, what="index"))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise MissingIndex(url, "there is no such index") from error
    except ValueError as error:
        raise BadIndex(url, f"cannot be read: {error}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise BadIndex(url, f"not a {FORMAT}")
    if manifest.get("version") != VERSION:
        raise BadIndex(url, f"version is {manifest.get('version')!r}, this release reads {VERSION}")
    try:
        parsed = Manifest(_entries(manifest["shards"]), *_counts([manifest["num_labels"]]))
        stated = manifest["num_samples"]
    except (KeyError, TypeError, ValueError) as error:
        raise BadIndex(url, f"malformed: {error!r}") from error
    if parsed.num_labels > LARGEST_LABEL + 1:
        raise BadIndex(url, f"{parsed.num_labels:,} labels; allowed: {LARGEST_LABEL + 1:,}")
    num_samples = sum(parsed.entries.nums_samples)
    if num_samples > MOST_SAMPLES:
        raise BadIndex(url, f"{num_samples:,} samples; allowed: {MOST_SAMPLES:,}")
    if num_samples != stated or not num_samples:
        raise BadIndex(url, f"the shards hold {num_samples} samples, the manifest says {stated}")
    return parsed


def _entries(lines: Any) -> ShardEntries:
    return ShardEntries(
        shards=_texts([line["shard"] for line in lines]),
        indexes=_texts([line["index"] for line in lines]),
        nums_samples=_counts([line["num_samples"] for line in lines]),
        nums_bytes=_counts([line["bytes"] for line in lines]),
        digests=_texts([line["digest"] for line in lines]),
    )


def _texts(values: list[Any]) -> list[str]:
    if not set(map(type, values)) <= {str}:
        raise TypeError("a name is no text")
    return values


def _counts(values: list[Any]) -> list[int]:
    if not set(map(type, values)) <= {int} or min(values, default=0) < 0:
        raise TypeError("a number of samples, bytes or labels is none")
    return values
