"""Making the Parquet tables of existing shards: in parallel, and not again those that are there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from datapipe.errors import MissingShard, UnreadableUrl
from datapipe.shard_jobs import for_each_shard
from datapipe.shard_walk import walk_shard
from datapipe.storage import directory_of, exists, is_private, local_path, modified, size_of
from datapipe.table import TableFacts, read_facts, write_table


@dataclass(frozen=True)
class TableJob:
    """A shard and the table to make of it."""

    shard_url: str
    table_url: str
    with_crc32: bool

    @property
    def shard_name(self) -> str:
        """As manifest and table have it: its URL, but for the name alone beside the table."""
        is_beside = directory_of(self.shard_url) == directory_of(self.table_url)
        return self.shard_url.rpartition("/")[2] if is_beside else self.shard_url

    @property
    def is_remote(self) -> bool:
        """Then all of the shard comes over, and the crc32 of its images costs nothing more."""
        return local_path(self.shard_url) is None


@dataclass(frozen=True)
class MadeTable:
    """A table that is there now."""

    facts: TableFacts
    warnings: tuple[str, ...]
    is_kept: bool
    """It was there before, and newer than the shard."""


def make_tables(jobs: Sequence[TableJob], *, num_processes: int) -> Iterator[tuple[int, MadeTable]]:
    """The number of each job and its table, as they come. Errors: those of `make_table`."""
    if any(is_private(url) for job in jobs for url in (job.shard_url, job.table_url)):
        num_processes = 1
    return for_each_shard(make_table, jobs, num_processes=num_processes)


def make_table(job: TableJob) -> MadeTable:
    """Errors: those of `walk_shard`; `OSError`."""
    num_bytes = shard_size(job.shard_url)
    kept = _kept(job, num_bytes)
    if kept is not None:
        return MadeTable(kept, (), is_kept=True)
    contents = walk_shard(job.shard_url, with_crc32=job.with_crc32)
    facts = TableFacts.of(contents.entries, shard=job.shard_name, shard_bytes=num_bytes)
    write_table(job.table_url, contents.entries, facts=facts)
    return MadeTable(facts, contents.warnings, is_kept=False)


def shard_size(url: str) -> int:
    try:
        return size_of(url)
    except (FileNotFoundError, NotADirectoryError) as error:
        if exists(url):  # HTTP's `size` takes every refusal for a missing file; this does not
            raise UnreadableUrl(url, "its size is not told") from error
        raise MissingShard((url,)) from error


def _kept(job: TableJob, num_bytes: int) -> TableFacts | None:
    """The facts of the table that is there, if it was made of this very shard, and with crc32 where
    that is asked for.
    """
    facts = read_facts(job.table_url)
    if facts is None or (facts.shard, facts.shard_bytes) != (job.shard_name, num_bytes):
        return None
    if not facts.has_crc32 and (job.with_crc32 or job.is_remote):
        return None
    shard_time, table_time = modified(job.shard_url), modified(job.table_url)
    if shard_time is None or table_time is None or table_time < shard_time:
        return None
    return facts
