"""SampleReader: samples by id, read block by block."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from datapipe.errors import CorruptSample, MissingShard
from datapipe.index import ShardIndex
from datapipe.storage import read_range
from datapipe.table import LARGEST_LABEL, crc32_of

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


@dataclass
class _Block:
    samples: list[RawSample]
    num_unread: int


class SampleReader:
    """Fetches samples; a block is one ranged read (two, where it straddles two shards).

    A block is kept until each of its samples was fetched as often as there are samples in it, at
    most `max_blocks` of them. Not for use by several threads at once.
    """

    def __init__(self, index: ShardIndex, *, block_size: int, max_blocks: int) -> None:
        self._index = index
        self._block_size = block_size
        self.max_blocks = max_blocks
        self._blocks: OrderedDict[int, _Block] = OrderedDict()
        self._table = lru_cache(maxsize=NUM_CACHED_TABLES)(index.table)

    def fetch(self, sample_ids: NDArray[np.int64]) -> list[RawSample]:
        """Errors: `MissingShard`, `UnreadableUrl`, `BadIndex`."""
        return [self._sample(sample_id) for sample_id in sample_ids.tolist()]

    def _sample(self, sample_id: int) -> RawSample:
        number, row = divmod(sample_id, self._block_size)
        block = self._blocks.get(number)
        if block is None:
            block = self._blocks[number] = self._read_block(number)
            if len(self._blocks) > self.max_blocks:
                self._blocks.popitem(last=False)
        block.num_unread -= 1
        if not block.num_unread:
            del self._blocks[number]
        else:
            self._blocks.move_to_end(number)
        return block.samples[row]

    def _read_block(self, number: int) -> _Block:
        first = number * self._block_size
        last = min(first + self._block_size, self._index.num_samples)
        ids = np.arange(first, last, dtype=np.int64)
        shards, rows = self._index.locate(ids)
        samples: list[RawSample] = []
        for shard in np.unique(shards).tolist():
            of_shard = np.flatnonzero(shards == shard)
            samples.extend(self._read_run(shard, rows[of_shard], first_id=int(ids[of_shard[0]])))
        return _Block(samples, num_unread=len(samples))

    def _read_run(
        self, shard: int, rows: NDArray[np.int64], *, first_id: int
    ) -> Iterator[RawSample]:
        """Neighbouring samples of one shard, by one ranged read."""
        table = self._table(shard)
        run = slice(int(rows[0]), int(rows[-1]) + 1)
        offsets, sizes = table.offsets[run], table.sizes[run]
        start, stop = int(offsets.min()), int((offsets + sizes).max())
        content = _read_shard(self._index.shard_url(shard), start, stop)
        name = self._index.shards[shard].shard
        columns = (offsets, sizes, table.widths[run], table.heights[run])
        for number, (offset, size, width, height) in enumerate(
            zip(*(column.tolist() for column in columns), strict=True)
        ):
            row = run.start + number
            payload = content[offset - start : offset - start + size]
            yield RawSample(
                sample_id=first_id + number,
                payload=payload if len(payload) == size else None,
                labels=table.labels(row),
                width=width,
                height=height,
                shard=name,
                key=table.key(row),
                offset=offset,
                crc32=table.known_crc32(row),
            )


def _read_shard(url: str, start: int, stop: int) -> memoryview:
    try:
        return memoryview(read_range(url, start, stop))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise MissingShard((url,)) from error
