"""make bench-scale on a small setting: what it says, not how fast it is."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from datapipe.index import ShardIndex
from tests.benchmarks.made_up_index import MadeUpIndex, entries, register, write_index
from tests.clusters import ROOT

SMALL = {
    "shards": 40,
    "samples-per-shard": 200,
    "samples-done": 6400,
    "fragments": 20,
    "workers": 2,
    "lanes": 4,
    "batch-size": 32,
    "rounds": 1,
}
KEYS = {
    "seek_s",
    "seek_lanes_s",
    "seek_lease_s",
    "seek_fragmented_s",
    "import_s",
    "rss_mb",
    "shuffle_displacement",
    "adjacent_displacement",
}


def test_a_table_is_made_up_once(tmp_path: Path) -> None:
    register()
    index = ShardIndex.open(write_index(tmp_path, num_shards=3, samples_per_shard=7))
    num_made = MadeUpIndex.num_made
    tables = [index.table(2), index.table(2)]
    assert MadeUpIndex.num_made == num_made + 1
    for table in tables:
        assert table.offsets.tolist() == [entry.offset for entry in entries(2, num_samples=7)]
        assert list(table.keys) == [f"{number:09d}" for number in range(14, 21)]


@pytest.mark.slow
def test_the_last_line_has_every_figure() -> None:
    options = [f"--{name}={value}" for name, value in SMALL.items()]
    done = subprocess.run(
        [sys.executable, "-m", "tests.benchmarks.scale", *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode in (0, 1), done.stderr  # 1: a limit was missed, on a busy machine
    values = json.loads(done.stdout.splitlines()[-1])
    assert values.keys() == KEYS
    assert all(value > 0 for value in values.values())
