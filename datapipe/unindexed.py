"""Streaming from shards that have no index: plain webdataset, in the order of the tars.

For sets of which nobody has the time to make an index. It cannot do what needs one, and says so:

- there is no position: who starts again starts at the beginning of an epoch;
- workers own whole shards, so their numbers of batches differ, and the number of workers cannot
  change within an epoch;
- shuffling is that of shards, and of a buffer of samples;
- nobody knows the number of samples, nor their checksums.
"""

from __future__ import annotations

import logging
import random
import tarfile
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from webdataset import filters, tariterators

from datapipe.batch_stream import BatchStream
from datapipe.config import DataConfig
from datapipe.counters import ReadCounters
from datapipe.errors import MissingShard, UnreadableShard
from datapipe.hashing import key_of
from datapipe.order import Permutation
from datapipe.plan import BatchPlan, Segment
from datapipe.planned_samples import DrawnSample, Rows
from datapipe.reader import RawSample
from datapipe.shard_walk import labels_and_name
from datapipe.storage import absolute, opened
from datapipe.tar_walk import (
    IMAGE_EXTENSIONS,
    LABEL_EXTENSIONS,
    LARGEST_IMAGE_MEMBER,
    LARGEST_LABEL_MEMBER,
    is_one_piece,
    members,
    open_tar,
    read_at,
)

logger = logging.getLogger(__name__)

SHARDS_KEY, BUFFER_KEY = 7, 8
UNKNOWN = -1


def unindexed_stream(
    shard_urls: Sequence[str],
    config: DataConfig,
    *,
    batch_size: int,
    rank: int,
    world_size: int,
    num_epochs: int,
    seed: int,
    shuffle_buffer: int,
    training: bool,
    num_classes: int,
) -> BatchStream:
    """The batches of one of `world_size` workers: `batch_size` rows each, the last one padded.

    shard_urls: as `datapipe.index.list_shards` gives them. shuffle_buffer: samples, in memory, of
    which the next one is drawn; 0 for none. `max_bad_samples` must be a number: a share of nobody
    knows how many is none. In a batch, `spans` are empty, and `sample_ids` count
    this worker's samples. `next` raises, besides what `BatchStream` does, `MissingShard`,
    `UnreadableShard`, `UnreadableUrl`. A shard that ends early gives what it holds, with a warning.
    Raises `ValueError` with fewer shards than workers.
    """
    if not 0 <= rank < world_size <= len(shard_urls):
        raise ValueError(
            f"rank is {rank}, world_size {world_size}; without an index workers own whole shards, "
            f"so at most {len(shard_urls)} of them can read {len(shard_urls)} shards"
        )
    logger.warning(
        "shards are read without an index: no exact resume, no exact order, batches of workers "
        "differ in number; python -m datapipe index makes one shards=%d",
        len(shard_urls),
    )
    samples = _Samples(
        [absolute(url) for url in shard_urls],
        rank=rank,
        world_size=world_size,
        seed=seed,
        shuffle_buffer=shuffle_buffer if training else 0,
    )
    return BatchStream(
        samples.batches(batch_size, num_epochs=num_epochs),
        config,
        samples,
        seed=seed,
        training=training,
        num_classes=num_classes,
        num_bad_allowed=config.bad_samples_allowed(1),
    )


class _Samples:
    """What one worker finds in its shards."""

    def __init__(
        self, urls: Sequence[str], *, rank: int, world_size: int, seed: int, shuffle_buffer: int
    ) -> None:
        self._urls = urls
        self._rank = rank
        self._world_size = world_size
        self._seed = seed
        self._shuffle_buffer = shuffle_buffer
        self._counters = ReadCounters()

    def batches(self, batch_size: int, *, num_epochs: int) -> Iterator[tuple[BatchPlan, Rows]]:
        plan = BatchPlan((Segment((), batch_size),))
        rows: Rows = []
        for epoch in range(num_epochs):
            for drawn in self._of_epoch(epoch):
                rows.append(drawn)
                if len(rows) == batch_size:
                    yield plan, rows
                    rows = []
        if rows:
            yield plan, rows + [None] * (batch_size - len(rows))

    def in_order(self) -> Iterator[DrawnSample]:
        return self._of_epoch(0)

    def counters(self) -> ReadCounters:
        """Bytes are those of images."""
        return self._counters

    def close(self) -> None:
        """There is no thread."""

    def _of_epoch(self, epoch: int) -> Iterator[DrawnSample]:
        order = Permutation(len(self._urls), key_of(self._seed, epoch, SHARDS_KEY))
        places = np.arange(self._rank, len(self._urls), self._world_size, dtype=np.int64)
        found = self._found([self._urls[number] for number in order(places).tolist()])
        if self._shuffle_buffer:
            generator = random.Random(int(key_of(self._seed, epoch, self._rank, BUFFER_KEY)))
            found = filters.shuffle(self._shuffle_buffer, rng=generator)(found)
        for number, sample in enumerate(found):
            raw = _raw_sample(sample, sample_id=number * self._world_size + self._rank)
            if raw is not None and raw.payload is not None:
                self._counters += ReadCounters(bytes_read=len(raw.payload), num_reads=1)
                yield DrawnSample(raw, epoch)

    def _found(self, urls: Sequence[str]) -> Iterator[dict[str, Any]]:
        """What webdataset makes of the members of these shards, one after the other."""
        for url in urls:
            yield from tariterators.group_by_keys(_members(url), handler=_is_left_out)


def _members(url: str) -> Iterator[dict[str, Any]]:
    """The image and label members of a shard, as webdataset has them; no others are read.

    tarfile itself, as webdataset calls it, takes a damaged header for the end of the archive.
    """
    try:
        with opened(url) as file, open_tar(file) as tar:
            try:
                for member in members(tar):
                    if is_one_piece(member) and (limit := _limit(member.name)):
                        content = b"" if member.size > limit else _content(tar, member)
                        yield {"fname": member.name, "data": content, "__url__": url}
            except tarfile.ReadError as error:
                logger.warning("shard ends early shard=%s reason=%s", url, error)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise MissingShard((url,)) from error
    except tarfile.TarError as error:
        raise UnreadableShard(url, str(error)) from error


def _limit(name: str) -> int:
    """The largest size of a member of this name, in bytes; 0 if it is neither image nor label."""
    extension = (tariterators.base_plus_ext(name)[1] or "").lower()
    if extension in IMAGE_EXTENSIONS:
        return LARGEST_IMAGE_MEMBER
    return LARGEST_LABEL_MEMBER if extension in LABEL_EXTENSIONS else 0


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    content = read_at(tar, member.offset_data, member.size)
    if len(content) < member.size:
        raise tarfile.ReadError(f"{member.name} is cut short")
    return content


def _is_left_out(error: Exception) -> bool:
    """What webdataset asks after an error: True to go on with what follows."""
    if not isinstance(error, ValueError):
        raise error
    logger.warning("part of a shard was left out reason=%s", error.args[0])
    return True


def _raw_sample(sample: dict[str, Any], *, sample_id: int) -> RawSample | None:
    """None where there is no image."""
    payloads = [sample[extension] for extension in IMAGE_EXTENSIONS if extension in sample]
    if not payloads:
        return None
    labels = [
        found
        for extension in LABEL_EXTENSIONS
        if extension in sample
        and (found := labels_and_name(extension, sample[extension])[0]) is not None
    ]
    return RawSample(
        sample_id=sample_id,
        payload=memoryview(payloads[0]),
        labels=np.array(labels[-1], np.int64) if labels else None,
        width=0,
        height=0,
        shard=sample["__url__"],
        key=sample["__key__"],
        offset=UNKNOWN,
        crc32=None,
    )
