"""Shards against their index: every sample's place, bytes and labels; decoded too, if asked for.

Reads all of every shard. A fault is reported, whatever its kind, and the check goes on.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from datapipe.decode import DecodeError, check_decodes
from datapipe.errors import NUM_LISTED, BadIndex, MissingShard, UnreadableShard
from datapipe.index import ShardIndex
from datapipe.safe_text import printable
from datapipe.shard_jobs import for_each_shard
from datapipe.shard_walk import walk_shard
from datapipe.storage import is_private, opened
from datapipe.table import SampleEntry, ShardTable, read_table
from datapipe.table_making import shard_size


@dataclass(frozen=True)
class Fault:
    """Where a shard is not what the index says; key None: the shard itself."""

    shard: str
    key: str | None
    offset: int
    reason: str

    def __str__(self) -> str:
        sample = "" if self.key is None else f"sample {self.key} at byte {self.offset}: "
        return printable(f"{self.shard}: {sample}{self.reason}")


@dataclass(frozen=True)
class ShardReport:
    """What was found in one shard."""

    faults: tuple[Fault, ...]
    num_samples: int
    num_unknown_crc32: int
    """Samples whose bytes the index does not know: only that they lie where it says."""


@dataclass(frozen=True)
class ShardCheck:
    """One shard to be checked."""

    shard: str
    shard_url: str
    table_url: str
    num_samples: int
    num_bytes: int
    num_labels: int
    is_deep: bool


def verify(index: ShardIndex, *, is_deep: bool, num_processes: int) -> Iterator[ShardReport]:
    """A report on each shard, as they come. is_deep: decode all images. Errors: `UnreadableUrl`."""
    checks = [
        ShardCheck(
            entry.shard,
            index.shard_url(number),
            index.table_url(number),
            entry.num_samples,
            entry.bytes,
            index.num_labels,
            is_deep,
        )
        for number, entry in enumerate(index.shards)
    ]
    if any(is_private(check.shard_url) for check in checks):
        num_processes = 1
    for _, report in for_each_shard(verify_shard, checks, num_processes=num_processes):
        yield report


def verify_shard(check: ShardCheck) -> ShardReport:
    """Errors: `UnreadableUrl`."""
    try:
        table = read_table(check.table_url)
        num_bytes = shard_size(check.shard_url)
        contents = walk_shard(check.shard_url, with_crc32=True)
    except MissingShard:
        return ShardReport((Fault(check.shard, None, 0, "the shard is missing"),), 0, 0)
    except (BadIndex, UnreadableShard) as error:
        return ShardReport((Fault(check.shard, None, 0, str(error)),), 0, 0)
    found = {entry.key: entry for entry in contents.entries}
    faults = [
        *_faults_of_shard(check, table, num_bytes),
        *_faults_of_samples(check.shard, table, found),
    ]
    if check.is_deep:
        faults.extend(_faults_of_images(check, contents.entries))
    return ShardReport(tuple(faults), table.num_samples, int((~table.has_crc32).sum()))


def _faults_of_shard(check: ShardCheck, table: ShardTable, num_bytes: int) -> Iterator[Fault]:
    if num_bytes != check.num_bytes:
        reason = f"{num_bytes:,} bytes, the index says {check.num_bytes:,}"
        yield Fault(check.shard, None, 0, reason)
    if table.num_samples != check.num_samples:
        reason = f"its table has {table.num_samples:,} samples, the manifest {check.num_samples:,}"
        yield Fault(check.shard, None, 0, reason)
    if table.label_ids.size and table.label_ids.max() >= check.num_labels:
        reason = f"its table has label {table.label_ids.max()}, the manifest {check.num_labels:,}"
        yield Fault(check.shard, None, 0, f"{reason} labels")
    twice = [key for key, count in Counter(table.keys).items() if count > 1]
    if twice:
        reason = f"its table has {len(twice):,} samples more than once, such as {twice[0]!r}"
        yield Fault(check.shard, None, 0, reason)


def _faults_of_samples(
    shard: str, table: ShardTable, found: Mapping[str, SampleEntry]
) -> Iterator[Fault]:
    for row, key in enumerate(table.keys):
        reason = _difference(table, row, found.get(key))
        if reason is not None:
            yield Fault(shard, key, int(table.offsets[row]), reason)
    for key in found.keys() - set(table.keys):
        yield Fault(shard, key, found[key].offset, "the index does not know this sample")


def _difference(table: ShardTable, row: int, found: SampleEntry | None) -> str | None:
    """How a sample differs from its row, None where it does not."""
    if found is None:
        return "it is not in the shard, or comes after a place where that is damaged"
    offset, size = int(table.offsets[row]), int(table.sizes[row])
    if (found.offset, found.size) != (offset, size):
        return f"it is {found.size} bytes at byte {found.offset}, the index says {size} bytes"
    if table.has_crc32[row] and found.crc32 != table.crc32[row]:
        return "its bytes are not those that were indexed (crc32 differs)"
    ids = table.labels(row)
    labels = None if ids is None else tuple(ids.tolist())
    if labels != found.labels:
        return f"its labels are {_listed(found.labels)}, the index says {_listed(labels)}"
    return None


def _faults_of_images(check: ShardCheck, entries: Sequence[SampleEntry]) -> Iterator[Fault]:
    with opened(check.shard_url) as file:
        for entry in entries:
            file.seek(entry.offset)
            try:
                check_decodes(file.read(entry.size))
            except DecodeError as error:
                yield Fault(check.shard, entry.key, entry.offset, str(error))


def _listed(labels: tuple[int, ...] | None) -> str:
    if labels is None:
        return "none of use"
    more = ", ..." if len(labels) > NUM_LISTED else ""
    return f"[{', '.join(map(str, labels[:NUM_LISTED]))}{more}]"
