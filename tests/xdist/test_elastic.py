"""Synchronous runs on clusters that change: nodes are killed, parted, drained, and join."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from datapipe.position import Position
from tests.autoscaling import autoscaling_cluster, raise_max_workers
from tests.clusters import QUICK_HEALTH_CHECKS, AddedNode, Cluster, own_cluster, wait_until
from tests.namespaces import network
from tests.recorded import Planned, Recording, kill_self, recorded_topology
from tests.small_runs import NUM_TRAIN, causes, final, records, run, small_config
from xdist.config import ClusterConfig, TrainConfig
from xdist.topologies import nodes

pytestmark = [pytest.mark.faults, pytest.mark.ray, pytest.mark.timeout(240)]


def config_of(directory: Path, **changes: Any) -> TrainConfig:
    config = small_config(directory, strategy="all_reduce", **changes)
    return replace(config, batch_size=12, num_lanes=12, num_epochs=8)


def check(config: TrainConfig, directory: Path) -> Recording:
    recording = Recording(directory / "recording")
    recording.check(num_samples=NUM_TRAIN, num_epochs=config.num_epochs)
    assert final(directory / "run").manifest.cut.position == Position(epoch=config.num_epochs)
    return recording


@pytest.fixture
def own() -> Iterator[Cluster]:
    """A head with room for two workers, which this process drives."""
    with own_cluster(num_cpus=2, variables=QUICK_HEALTH_CHECKS) as cluster, cluster.connected():
        yield cluster


def test_the_others_go_on_when_a_whole_node_is_killed(tmp_path: Path, own: Cluster) -> None:
    node = own.add_node(num_cpus=1)
    config = config_of(tmp_path, num_workers=3)
    planned = Planned("kill-node", None, 10, node.kill, node_id=nodes.here())
    topologies = recorded_topology(tmp_path / "recording", [planned])
    run(config, tmp_path / "run", topologies=topologies)
    assert check(config, tmp_path).sizes() == [3, 2]
    assert len(causes(tmp_path / "run")) == 1


def test_a_drained_node_is_left_at_the_end_of_a_step_and_then_leaves(
    tmp_path: Path, own: Cluster
) -> None:
    node = own.add_node(num_cpus=1)
    config = config_of(tmp_path, num_workers=3)
    planned = Planned("drain", None, 10, partial(node.drain, deadline_s=120), node_id=nodes.here())
    topologies = recorded_topology(tmp_path / "recording", [planned])
    run(config, tmp_path / "run", topologies=topologies)
    assert check(config, tmp_path).sizes() == [3, 2]
    assert causes(tmp_path / "run") == []
    wait_until(lambda: None if node.node_id in nodes.others() else "gone")


@pytest.mark.parametrize(("num_workers", "sizes"), [(1, [1, 2, 1]), (3, [3, 3])])
def test_who_is_needed_leaves_a_drained_node_when_another_is_there(
    tmp_path: Path, num_workers: int, sizes: list[int]
) -> None:
    """There is room for another only on a node that joins when the drain has begun."""
    recording = tmp_path / "recording"
    cluster_config = ClusterConfig(min_world_size=num_workers)
    config = config_of(tmp_path, num_workers=num_workers, cluster=cluster_config)
    with own_cluster(num_cpus=num_workers - 1, variables=QUICK_HEALTH_CHECKS) as cluster:
        node = cluster.add_node(num_cpus=1)
        begins = partial(node.drain, deadline_s=120)
        planned = Planned("drain", None, 10, begins, node_id=node.node_id)

        def add_node_then() -> None:
            wait_until(lambda: (recording / "drain").exists() or None)
            cluster.add_node(num_cpus=1)

        with cluster.connected(), ThreadPoolExecutor(1) as beside:
            added = beside.submit(add_node_then)
            topologies = recorded_topology(recording, [planned], num_slow_steps=100)
            run(config, tmp_path / "run", topologies=topologies)
            added.result()
    assert check(config, tmp_path).sizes() == sizes
    assert causes(tmp_path / "run") == []


def test_who_dies_on_a_drained_node_is_replaced_elsewhere(tmp_path: Path) -> None:
    """It has a place there, at which Ray starts nobody any more."""
    cluster_config = ClusterConfig(min_world_size=2, placement="SPREAD", wait_s=60)
    config = config_of(tmp_path, num_workers=2, cluster=cluster_config)
    with own_cluster(num_cpus=1, variables=QUICK_HEALTH_CHECKS) as cluster:
        drained = [cluster.add_node(num_cpus=1) for _ in range(2)]
        planned = [
            Planned("drain", None, 10, partial(drain_and_die, node), node_id=node.node_id)
            for node in drained
        ]
        with cluster.connected():
            topologies = recorded_topology(tmp_path / "recording", planned)
            run(config, tmp_path / "run", topologies=topologies)
    assert check(config, tmp_path).sizes()[0] == 2
    assert len(causes(tmp_path / "run")) == 1


def drain_and_die(node: AddedNode) -> None:
    node.drain(deadline_s=300)
    kill_self()


def test_nodes_that_join_are_used_and_nobody_starts_again(tmp_path: Path) -> None:
    with (
        autoscaling_cluster(num_cpus=1, cpus_per_node=1, max_workers=1) as scaling,
        scaling.cluster.connected(),
    ):
        cluster = ClusterConfig(max_world_size=3)
        config = replace(config_of(tmp_path, cluster=cluster), num_workers="auto", num_epochs=20)
        planned = Planned("raise", None, 20, partial(raise_max_workers, scaling.file, 2))
        topologies = recorded_topology(tmp_path / "recording", [planned], num_slow_steps=100)
        run(config, tmp_path / "run", topologies=topologies)
        recording = check(config, tmp_path)
        assert recording.sizes() == [1, 2, 3]
        assert causes(tmp_path / "run") == []
        assert len(list((tmp_path / "recording").glob("worker-*"))) == 3
        groups = records(tmp_path / "run", "group")
        raised = (tmp_path / "recording" / "raise").stat().st_mtime
        assert groups[-1]["time"] - raised < 60


def test_the_side_of_the_driver_goes_on_when_the_network_parts(tmp_path: Path) -> None:
    config = config_of(
        tmp_path, num_workers=2, cluster=ClusterConfig(collective_timeout_s=3, placement="SPREAD")
    )
    with (
        network(2) as (first, second),
        own_cluster(num_cpus=1, variables=QUICK_HEALTH_CHECKS, host=first) as cluster,
        (tmp_path / "output").open("wb") as output,
    ):
        cluster.add_node(num_cpus=1, host=second)
        (tmp_path / "arguments.pkl").write_bytes(pickle.dumps((config, second)))
        command = [sys.executable, "-m", "tests.parted_run", str(tmp_path)]
        assert cluster.start_driver(command, output=output).wait() == 0
    assert check(config, tmp_path).sizes() == [2, 1]
    assert len(causes(tmp_path / "run")) >= 1
