"""One resume in a fresh process: from a position to where the first batch's images lie.

python -m tests.benchmarks.seek: the `Request` comes on stdin, the `Seek` goes to stdout, as JSON.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from datapipe.index import ShardIndex
from datapipe.lanes import assign_lanes
from datapipe.order import Drawn, Order, SampleOrder
from datapipe.plan import BatchPlan, lane_batches, leased_batches
from datapipe.position import Position, Span
from tests.benchmarks.made_up_index import MadeUpIndex, key_of, register
from xdist.ledger import Ledger


@dataclass(frozen=True)
class Group:
    """The workers, and how they read."""

    num_workers: int
    num_lanes: int
    batch_size: int
    """Samples of one worker's batch."""
    block_size: int
    blocks_per_pool: int
    seed: int


@dataclass(frozen=True)
class Request:
    """What a process is to do."""

    index_url: str
    position: dict[str, Any]
    """As a checkpoint holds it."""
    group: Group
    is_leased: bool
    """For an asynchronous worker; else for a synchronous one."""

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> Request:
        value = json.loads(text)
        return Request(**{**value, "group": Group(**value["group"])})


@dataclass(frozen=True)
class Seek:
    """What was measured."""

    import_s: float
    """From the start of the process, interpreter included."""
    seek_s: float
    cpu_s: float
    """Of `seek_s`, on all cores together."""
    peak_mb: float
    """The most memory that the process held."""
    num_tables: int
    """Tables of shards that were read."""
    num_made: int
    """Of these, made up on the way: then the time means nothing."""


@dataclass(frozen=True)
class Place:
    """Where one image lies."""

    sample_id: int
    url: str
    key: str
    offset: int
    length: int


def order_of(num_samples: int, group: Group) -> SampleOrder:
    return SampleOrder(num_samples, group.block_size, group.blocks_per_pool, group.seed)


def first_batch(request: Request) -> list[Place]:
    """Everything that a resumed worker does before it reads images."""
    index = ShardIndex.open(request.index_url)
    order = order_of(index.num_samples, request.group)
    position = Position.from_json(request.position)
    plans = (
        _leased(order, position, request.group)
        if request.is_leased
        else _in_lanes(order, position, request.group)
    )
    return _places(index, order, next(iter(plans)).spans)


def _in_lanes(order: Order, position: Position, group: Group) -> Iterable[BatchPlan]:
    lanes = assign_lanes(group.num_lanes, group.num_workers)[0]
    return lane_batches(
        position,
        num_samples=order.num_samples,
        num_lanes=group.num_lanes,
        samples_per_lane=group.batch_size // len(lanes),
        lanes=lanes,
        num_epochs=position.epoch + 1,
    )


def _leased(order: Order, position: Position, group: Group) -> Iterable[BatchPlan]:
    ledger = Ledger(
        position,
        order=order,
        num_places=(position.epoch + 1) * order.num_samples,
        batch_size=group.batch_size,
    )
    tokens = [ledger.register(worker) for worker in range(group.num_workers)]
    leases = iter(lambda: ledger.lease(0, tokens[0]), None)
    return leased_batches(leases, batch_size=group.batch_size)


def _places(index: ShardIndex, order: Order, spans: Iterable[Span]) -> list[Place]:
    sample_ids = Drawn.joined([order.draw(span) for span in spans]).sample_ids
    shards, rows = index.locate(sample_ids)
    tables = {shard: index.table(shard) for shard in np.unique(shards).tolist()}
    return [
        Place(
            sample_id,
            index.shard_url(shard),
            tables[shard].key(row),
            int(tables[shard].offsets[row]),
            int(tables[shard].sizes[row]),
        )
        for sample_id, shard, row in zip(
            sample_ids.tolist(), shards.tolist(), rows.tolist(), strict=True
        )
    ]


def _seconds_since_start() -> float:
    """Since this process began; to a hundredth."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    started = int(fields[19]) / os.sysconf("SC_CLK_TCK")
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started


def _peak_mb() -> float:
    """VmHWM: as ru_maxrss, which begins with the parent's memory where that forks or spawns."""
    lines = Path("/proc/self/status").read_text().splitlines()
    [kib] = [int(line.split()[1]) for line in lines if line.startswith("VmHWM:")]
    return kib * 1024 / 1e6


def main() -> None:
    """Seek, and say how long it took."""
    import_s = _seconds_since_start()
    request = Request.from_json(sys.stdin.read())
    register()
    cpu_s, seek_s = time.process_time(), time.perf_counter()
    places = first_batch(request)
    cpu_s, seek_s = time.process_time() - cpu_s, time.perf_counter() - seek_s
    assert len(places) == request.group.batch_size
    assert all(place.key == key_of(place.sample_id) for place in places)
    num_tables = len({place.url for place in places})
    seek = Seek(import_s, seek_s, cpu_s, _peak_mb(), num_tables, MadeUpIndex.num_made)
    sys.stdout.write(json.dumps(asdict(seek)) + "\n")


if __name__ == "__main__":
    main()
