"""What a worker that is profiled says of its steps."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from tests.listed_batches import CONFIG, Listed, make_batch
from tests.xdist.test_all_reduce import membership_of, start_checkpoint
from xdist.flat import FlatModel
from xdist.segments import Dealing
from xdist.strategies.all_reduce import AllReduce, Membership
from xdist.strategies.group import open_store
from xdist.worker import Worker, initial_model
from xdist.worker_messages import JoinReport


def profiled(directory: Path, *, number: int = 0) -> Worker:
    """A worker that will be in a group of its own, with nine batches."""
    config = replace(CONFIG, profile=True).resolved(100)
    flat = FlatModel(initial_model(config, num_classes=3))
    start = start_checkpoint(directory, flat)

    def make_strategy(flat: FlatModel) -> AllReduce:
        return AllReduce(
            config, flat, checkpoint_url=start.url, run_dir=str(directory), own_address="127.0.0.1"
        )

    worker = Worker(
        config,
        number=number,
        num_classes=3,
        make_strategy=make_strategy,
        make_batches=partial(Listed, [make_batch(number) for number in range(9)]),
    )
    worker.start()
    return worker


def alone(port: int) -> Membership:
    dealing = Dealing(100, num_lanes=1, samples_per_lane=4)
    return membership_of(0, port, world_size=1, dealing=dealing, timeout_s=30.0)


def test_a_profile_says_where_the_time_of_a_step_goes(tmp_path: Path) -> None:
    store, worker = open_store("127.0.0.1"), profiled(tmp_path)
    assert worker.join(alone(store.port)) == JoinReport(0, None)
    assert worker.train(7).profile is None  # Not complete before the eighth step.
    profile = worker.train(8).profile
    assert profile is not None
    assert profile.times.num_steps == 5
    milliseconds = profile.times.milliseconds()
    names = ["data", "forward", "backward", "all_reduce", "optimizer", "other"]
    assert list(milliseconds) == names
    assert all(value > 0 for value in milliseconds.values())
    table = profile.times.table().splitlines()
    assert len(table) == len(names) + 2
    assert float(table[-1].split()[1]) == pytest.approx(sum(milliseconds.values()), abs=0.01)
    assert worker.train(9).profile is None  # It was taken.


def test_the_trace_of_a_profile_has_five_steps_and_their_phases(tmp_path: Path) -> None:
    store, worker = open_store("127.0.0.1"), profiled(tmp_path)
    worker.join(alone(store.port))
    profile = worker.train(9).profile
    assert profile is not None
    events = json.loads(gzip.decompress(profile.trace))["traceEvents"]
    counts = Counter(event["name"] for event in events if event.get("cat") == "user_annotation")
    phases = ("data", "forward", "backward", "all_reduce", "optimizer")
    assert {name: counts[name] for name in phases} == dict.fromkeys(phases, 5)
    assert any("conv" in event["name"] for event in events)


def test_only_the_first_worker_is_profiled(tmp_path: Path) -> None:
    store, worker = open_store("127.0.0.1"), profiled(tmp_path, number=1)
    worker.join(alone(store.port))
    assert worker.train(9).profile is None
