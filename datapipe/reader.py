"""SampleReader: samples by id, read block by block."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from datapipe.block_memory import Block, BlockMemory
from datapipe.counters import ReadCounters
from datapipe.errors import CorruptSample, MissingShard
from datapipe.index import ShardIndex
from datapipe.range_reader import RangeReader
from datapipe.table import LARGEST_LABEL, ShardTable, crc32_of
from datapipe.table_cache import TableCache

NUM_CACHED_TABLES = 128


@dataclass(frozen=True, eq=False, slots=True)
class RawSample:
    """One sample as it lies in its shard."""

    sample_id: int
    payload: memoryview | None
    """The image's bytes; None where the shard ends before them."""
    labels: NDArray[np.int64] | None
    width: int
    height: int
    shard: str
    key: str
    offset: int
    crc32: int | None
    """None where it is not known, and not checked."""

    def problem(self) -> str | None:
        """Why this sample cannot be used, as far as its bytes tell without decoding them."""
        if self.payload is None:
            return "the shard ends before this sample does"
        if self.labels is None:
            return f"it has no usable label (allowed: ids from 0 to {LARGEST_LABEL:,})"
        if self.crc32 is not None and crc32_of(self.payload) != self.crc32:
            return "its bytes are not those that were indexed (crc32 differs)"
        return None

    def corrupt(self, reason: str) -> CorruptSample:
        return CorruptSample(self.shard, self.key, self.offset, reason)


@dataclass(frozen=True, eq=False)
class _Run:
    """Neighbouring samples of one shard: what one ranged read fetches."""

    shard: int
    table: ShardTable
    rows: slice
    first_id: int

    @property
    def limits(self) -> tuple[int, int]:
        """[start, stop), in bytes of the shard."""
        offsets = self.table.offsets[self.rows]
        return int(offsets.min()), int((offsets + self.table.sizes[self.rows]).max())


class SampleReader:
    """Fetches samples; a block is one ranged read (two, where it straddles two shards).

    `num_threads` blocks are read at once: those that `prefetch` named, those that `fetch` needs. A
    block is kept until each of its samples was fetched as often as there are samples in it. The
    blocks that are here or being read are at most `max_blocks` and take at most `max_bytes`: where
    one has no place, those go that were not used for longest, except what is to be kept; if that
    does not do, its samples are read one by one as they are fetched.

    Not for use by several threads at once, except `counters` and `close`.
    """

    def __init__(
        self,
        index: ShardIndex,
        *,
        block_size: int,
        max_blocks: int | None,
        max_bytes: int = 1_000_000_000,
        num_threads: int = 8,
        ranges: RangeReader | None = None,
    ) -> None:
        self._index = index
        self._block_size = block_size
        self._ranges = ranges or RangeReader()
        self._tables = TableCache(self._read_table, max_tables=NUM_CACHED_TABLES)
        self._memory = BlockMemory[RawSample](max_blocks=max_blocks, max_bytes=max_bytes)
        self._executor = ThreadPoolExecutor(num_threads, thread_name_prefix="read blocks")

    def fetch(self, sample_ids: NDArray[np.int64]) -> list[RawSample]:
        """Errors: `MissingShard`, `UnreadableUrl`, `BadIndex`."""
        of_block: dict[int, list[int]] = {}
        for sample_id in sample_ids.tolist():
            of_block.setdefault(sample_id // self._block_size, []).append(sample_id)
        needed = {block: len(ids) for block, ids in of_block.items()}
        waiting = dict.fromkeys(of_block)
        apart: dict[int, Future[RawSample]] = {}
        samples = []
        for sample_id in sample_ids.tolist():
            block = sample_id // self._block_size
            while waiting:
                upcoming = next(iter(waiting))
                is_due = upcoming == block
                if not self._start(upcoming, needed={} if is_due else needed):
                    if self._memory.may_get_free and not is_due:
                        break
                    apart |= self._start_apart(of_block[upcoming])
                del waiting[upcoming]
            samples.append(self._take(sample_id, of_block, apart))
            needed[block] -= 1
        return samples

    def prefetch(self, blocks: Iterable[int]) -> bool:
        """Start to read these blocks, as far as there is room; whether there was for all."""
        return all(self._start(block, needed={}) for block in blocks)

    def keep(self, blocks: Collection[int]) -> None:
        """Drop all blocks but these, which from now on do not go for others."""
        self._memory.keep(blocks)

    def counters(self) -> ReadCounters:
        return self._ranges.counters()

    def close(self) -> None:
        """End the threads; a read that is going on ends with its attempt."""
        self._ranges.close()
        self._executor.shutdown(wait=False, cancel_futures=True)

    def _start(self, number: int, *, needed: Mapping[int, int]) -> bool:
        """Whether a block is here or being read now."""
        if number in self._memory:
            return True
        ids = self._ids(number)
        block = self._memory.add(
            number, num_bytes=self._estimate(ids), num_samples=len(ids), needed=needed
        )
        if block is None:
            return False
        block.samples = self._executor.submit(self._read_block, block)
        return True

    def _start_apart(self, sample_ids: Iterable[int]) -> dict[int, Future[RawSample]]:
        return {
            sample_id: self._executor.submit(self._read_sample, sample_id)
            for sample_id in sample_ids
        }

    def _take(
        self, sample_id: int, of_block: Mapping[int, list[int]], apart: dict[int, Future[RawSample]]
    ) -> RawSample:
        """A sample, when it is here; of a block for which there is no place, on its own."""
        number, row = divmod(sample_id, self._block_size)
        if sample_id not in apart and not self._start(number, needed={}):
            apart |= self._start_apart(of_block[number])
        if sample_id in apart:
            return apart[sample_id].result()
        block = self._memory.use(number)
        try:
            samples = block.samples.result()
        except BaseException:
            self._memory.drop(number)
            raise
        block.num_unread -= 1
        if samples is None or not block.num_unread:
            self._memory.drop(number)
        if samples is None:
            apart |= self._start_apart(of_block[number])
            return apart[sample_id].result()
        return samples[row]

    def _ids(self, number: int) -> NDArray[np.int64]:
        """The samples of a block."""
        first = number * self._block_size
        last = min(first + self._block_size, self._index.num_samples)
        return np.arange(first, last, dtype=np.int64)

    def _estimate(self, ids: NDArray[np.int64]) -> int:
        """The bytes of these samples, if they are of their shards' mean size."""
        shards, counts = np.unique(self._index.locate(ids)[0], return_counts=True)
        entries = [self._index.shards[shard] for shard in shards.tolist()]
        return sum(
            entry.bytes * count // entry.num_samples
            for entry, count in zip(entries, counts.tolist(), strict=True)
        )

    def _read_block(self, block: Block[RawSample]) -> list[RawSample] | None:
        runs = self._runs(self._ids(block.number))
        num_bytes = sum(stop - start for start, stop in (run.limits for run in runs))
        if not self._memory.resize(block, num_bytes):
            return None
        return [sample for run in runs for sample in self._read_run(run)]

    def _read_sample(self, sample_id: int) -> RawSample:
        (run,) = self._runs(np.array([sample_id]))
        (sample,) = self._read_run(run)
        return sample

    def _runs(self, ids: NDArray[np.int64]) -> list[_Run]:
        shards, rows = self._index.locate(ids)
        runs = []
        for shard in np.unique(shards).tolist():
            of_shard = np.flatnonzero(shards == shard)
            first, last = int(rows[of_shard[0]]), int(rows[of_shard[-1]])
            first_id = int(ids[of_shard[0]])
            runs.append(_Run(shard, self._tables.get(shard), slice(first, last + 1), first_id))
        return runs

    def _read_table(self, shard: int) -> ShardTable:
        url = self._index.table_url(shard)
        return self._ranges.call(lambda: self._index.table(shard), url=url, what="table of samples")

    def _read_run(self, run: _Run) -> Iterator[RawSample]:
        """By one ranged read."""
        table, rows = run.table, run.rows
        entry = self._index.shards[run.shard]
        start, stop = run.limits
        content = self._read_shard(run.shard, start, stop)
        offsets, sizes = table.offsets[rows], table.sizes[rows]
        columns = (offsets, sizes, table.widths[rows], table.heights[rows])
        for number, (offset, size, width, height) in enumerate(
            zip(*(column.tolist() for column in columns), strict=True)
        ):
            row = rows.start + number
            payload = content[offset - start : offset - start + size]
            yield RawSample(
                sample_id=run.first_id + number,
                payload=payload if len(payload) == size else None,
                labels=table.labels(row),
                width=width,
                height=height,
                shard=entry.shard,
                key=table.key(row),
                offset=offset,
                crc32=table.known_crc32(row),
            )

    def _read_shard(self, shard: int, start: int, stop: int) -> memoryview:
        url, entry = self._index.shard_url(shard), self._index.shards[shard]
        try:
            return self._ranges.read(url, start, stop, version=f"{entry.digest} {entry.bytes}")
        except (FileNotFoundError, NotADirectoryError) as error:
            raise MissingShard((url,)) from error
