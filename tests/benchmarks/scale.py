"""A data set of 350 million samples in 35,000 shards: how long a resume takes, and what it holds.

python -m tests.benchmarks.scale

There are no images. The manifest is a file; a shard's table is a real Parquet file, made up when it
is first asked for (tests/benchmarks/made_up_index.py). Every kind of resume runs once to have its
tables made up, and then, in fresh processes that only read them, to be timed: from a position with
300 million samples done to the URL, key, offset and length of each image of the first batch. Kinds:
a synchronous worker's lanes, an asynchronous worker's lease; and both from a position that
asynchronous workers have left in many pieces.

The last line is one JSON object. Ends with 1 when a limit is missed.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console
from rich.table import Table

from datapipe.lanes import LanePlan
from datapipe.position import Position
from tests.benchmarks.displacement import Displacement, displacement
from tests.benchmarks.made_up_index import write_index
from tests.benchmarks.seek import Group, Request, Seek, order_of

ROOT = Path(__file__).resolve().parents[2]
LARGEST = {"seek_s": 1.0, "rss_mb": 500.0}
SMALLEST = {"shuffle_displacement": 0.5}


@dataclass(frozen=True)
class Arguments:
    """The command line."""

    shards: int = 35_000
    """Shards."""
    samples_per_shard: int = 10_000
    """Samples of each."""
    samples_done: int = 300_000_000
    """Samples that were trained on in this epoch; a multiple of the lanes and of the fragments."""
    fragments: int = 10_000
    """Intervals of the position that asynchronous workers have left."""
    workers: int = 16
    """Workers of the group."""
    lanes: int = 64
    """Lanes of synchronous workers."""
    batch_size: int = 256
    """Samples of a worker's batch."""
    rounds: int = 5
    """How often every kind of resume is timed."""
    pools: int = 20_000
    """Pools from which the displacement is estimated."""

    @property
    def num_samples(self) -> int:
        return self.shards * self.samples_per_shard

    @property
    def group(self) -> Group:
        """Blocks and pools are those of `DataConfig`."""
        return Group(
            num_workers=self.workers,
            num_lanes=self.lanes,
            batch_size=self.batch_size,
            block_size=64,
            blocks_per_pool=8,
            seed=0,
        )


def in_lanes(arguments: Arguments) -> Position:
    """Where synchronous workers are: every lane as far as the others."""
    num_lanes = arguments.lanes
    plan = LanePlan(Position(), arguments.num_samples, num_lanes, samples_per_lane=1)
    return plan.position_after(arguments.samples_done // num_lanes)


def in_fragments(arguments: Arguments, num_fragments: int) -> Position:
    """Where asynchronous workers are: intervals of one length, evenly spread."""
    stride = arguments.num_samples // num_fragments
    length = arguments.samples_done // num_fragments
    starts = range(0, num_fragments * stride, stride)
    return Position(done=tuple((start, start + length) for start in starts))


def kinds_of_resume(arguments: Arguments) -> Iterator[tuple[str, Position, bool]]:
    """Name, position, and whether the worker is an asynchronous one."""
    fragmented = in_fragments(arguments, arguments.fragments)
    yield "lanes", in_lanes(arguments), False
    yield "lease", in_fragments(arguments, 1), True
    yield "lanes, fragmented", fragmented, False
    yield "lease, fragmented", fragmented, True


def seek(request: Request) -> Seek:
    """Run it in a fresh process."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.benchmarks.seek"],
        input=request.to_json(),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return Seek(**json.loads(done.stdout))


def seeks(arguments: Arguments, directory: Path) -> dict[str, list[Seek]]:
    """Of every kind of resume: one to make up the tables, then those that count."""
    url = write_index(
        directory, num_shards=arguments.shards, samples_per_shard=arguments.samples_per_shard
    )
    requests = {
        kind: Request(url, position.to_json(), arguments.group, is_leased)
        for kind, position, is_leased in kinds_of_resume(arguments)
    }
    for request in requests.values():
        seek(request)
    timed: dict[str, list[Seek]] = {kind: [] for kind in requests}
    for _ in range(arguments.rounds):
        for kind, request in requests.items():
            timed[kind].append(seek(request))
    assert not any(each.num_made for kind in timed.values() for each in kind)
    return timed


def figures(timed: dict[str, list[Seek]], distances: Displacement) -> dict[str, Any]:
    """What the last line says: medians, of the slower kind; memory is the most that any held."""
    everything = [each for kind in timed.values() for each in kind]
    seek_s = {
        kind: round(statistics.median(each.seek_s for each in timed[kind]), 3) for kind in timed
    }
    return {
        "seek_s": max(seek_s["lanes"], seek_s["lease"]),
        "seek_lanes_s": seek_s["lanes"],
        "seek_lease_s": seek_s["lease"],
        "seek_fragmented_s": max(seek_s["lanes, fragmented"], seek_s["lease, fragmented"]),
        "import_s": round(statistics.median(each.import_s for each in everything), 2),
        "rss_mb": round(max(each.peak_mb for each in everything)),
        "shuffle_displacement": round(distances.of_shard, 3),
        "adjacent_displacement": round(distances.of_neighbours, 4),
    }


def table_of(timed: dict[str, list[Seek]]) -> Table:
    """For people."""
    table = Table(title="from a position to the first batch's images")
    for column in ("resume", "s, median", "s, worst", "CPU s", "tables read", "peak MB"):
        table.add_column(column, justify="left" if column == "resume" else "right")
    for kind, each in timed.items():
        times = [seek.seek_s for seek in each]
        table.add_row(
            kind,
            f"{statistics.median(times):.3f}",
            f"{max(times):.3f}",
            f"{statistics.median(seek.cpu_s for seek in each):.3f}",
            str(each[0].num_tables),
            f"{max(seek.peak_mb for seek in each):.0f}",
        )
    return table


def missed(values: dict[str, Any]) -> list[str]:
    """The limits that are not kept."""
    above = [f"{name} is above {limit}" for name, limit in LARGEST.items() if values[name] > limit]
    below = [f"{name} is below {limit}" for name, limit in SMALLEST.items() if values[name] < limit]
    return above + below


def main(arguments: Arguments) -> int:
    """Measure, and show it; 1 when a limit is missed."""
    with tempfile.TemporaryDirectory(prefix="bench-scale-") as directory:
        timed = seeks(arguments, Path(directory))
    distances = displacement(
        order_of(arguments.num_samples, arguments.group),
        samples_per_shard=arguments.samples_per_shard,
        num_pools=arguments.pools,
        seed=0,
    )
    values = figures(timed, distances)
    console = Console()
    console.print(table_of(timed))
    for line in missed(values):
        console.print(line, style="red")
    sys.stdout.write(json.dumps(values) + "\n")
    return 1 if missed(values) else 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Arguments, description=__doc__)))
