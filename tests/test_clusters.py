"""The clusters that tests make, the faults in them, and what Ray does then."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import ray._private.state
from local_head import ray_script
from ray.exceptions import ActorDiedError, ActorUnavailableError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import (
    NodeAffinitySchedulingStrategy,
    PlacementGroupSchedulingStrategy,
)

from tests.clusters import (
    QUICK_HEALTH_CHECKS,
    ROOT,
    AddedNode,
    Cluster,
    is_alive,
    own_cluster,
    process_id_of,
    wait_until,
)

pytestmark = [pytest.mark.faults, pytest.mark.ray, pytest.mark.timeout(120)]


class Actor:
    def node_id(self) -> str:
        return ray.get_runtime_context().get_node_id()

    def wait(self) -> None:
        """Do not return."""
        signal.pause()

    def kill(self, node: AddedNode) -> None:
        node.kill()


@pytest.fixture(scope="module")
def own() -> Iterator[Cluster]:
    """A head of one CPU, which this process drives."""
    with own_cluster(num_cpus=1, variables=QUICK_HEALTH_CHECKS) as cluster, cluster.connected():
        yield cluster


@pytest.fixture
def node(own: Cluster) -> Iterator[AddedNode]:
    """A node of 2 CPUs, killed after the test."""
    added = own.add_node(num_cpus=2)
    yield added
    added.kill()
    wait_until(lambda: None if is_alive(added.node_id) else "gone")


def start(scheduling: object) -> Any:
    actor_class: Any = ray.remote(Actor)
    return actor_class.options(num_cpus=1, scheduling_strategy=scheduling).remote()


def start_on(node: AddedNode) -> Any:
    return start(NodeAffinitySchedulingStrategy(node.node_id, soft=False))


def start_in(group: PlacementGroup) -> Any:
    return start(PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=0))


def exists(process_id: int) -> bool:
    return Path(f"/proc/{process_id}").exists()


def test_a_node_killed_by_one_of_its_actors_is_gone_with_all_processes(node: AddedNode) -> None:
    actor, other = start_on(node), start_on(node)
    assert ray.get([actor.node_id.remote(), other.node_id.remote()]) == [node.node_id] * 2
    process_ids = node.process_ids()
    assert {process_id_of(actor), process_id_of(other)} < set(process_ids)
    pending = other.wait.remote()
    actor.kill.remote(node)
    wait_until(lambda: None if any(map(exists, process_ids)) else "gone", limit_s=15)
    with pytest.raises((ActorUnavailableError, ActorDiedError)):
        ray.get(pending, timeout=30)
    wait_until(lambda: None if is_alive(node.node_id) else "lost", limit_s=30)
    with pytest.raises(ActorDiedError):
        ray.get(other.node_id.remote(), timeout=30)


def test_a_node_that_freezes_is_found_by_the_health_checks(node: AddedNode) -> None:
    actor = start_on(node)
    ray.get(actor.node_id.remote())
    node.freeze()
    with pytest.raises(ActorDiedError):
        ray.get(actor.node_id.remote(), timeout=40)
    assert all(map(exists, node.process_ids()))


def test_a_lost_bundle_waits_for_a_node_and_with_it_its_actor(
    own: Cluster, node: AddedNode
) -> None:
    group = placement_group([{"CPU": 2}])
    assert group.wait(30)
    node.kill()
    wait_until(lambda: None if is_alive(node.node_id) else "lost", limit_s=30)
    actor = start_in(group)
    first_call = actor.node_id.remote()
    assert ray.wait([first_call], timeout=1) == ([], [first_call])
    another = own.add_node(num_cpus=2)
    assert ray.get(first_call, timeout=30) == another.node_id
    remove_placement_group(group)
    another.end()
    wait_until(lambda: None if is_alive(another.node_id) else "gone")
    reasons = {one["NodeID"]: one["DeathReasonMessage"] for one in ray.nodes()}
    assert reasons[another.node_id] == "received SIGTERM"


@pytest.mark.parametrize("way", ["drain", "ray drain-node"])
def test_a_draining_node_is_listed_and_keeps_its_actors_but_gets_none(
    own: Cluster, node: AddedNode, tmp_path: Path, way: str
) -> None:
    group = placement_group([{"CPU": 2}])
    actor = start_in(group)
    assert ray.get(actor.node_id.remote(), timeout=30) == node.node_id
    if way == "drain":
        node.drain(deadline_s=1)
    else:
        drain_by_command(own, node, tmp_path)
    assert list(ray._private.state.state.get_draining_nodes()) == [node.node_id]
    first_call = start_in(group).node_id.remote()
    # The deadline passes here.
    assert ray.wait([first_call], timeout=3) == ([], [first_call])
    assert ray.get(actor.node_id.remote(), timeout=30) == node.node_id
    remove_placement_group(group)


def drain_by_command(cluster: Cluster, node: AddedNode, tmp_path: Path) -> None:
    options = {
        "--address": cluster.head.address,
        "--node-id": node.node_id,
        "--reason": "DRAIN_NODE_REASON_PREEMPTION",
        "--reason-message": "the machine is taken away",
        "--deadline-remaining-seconds": "1",
    }
    arguments = [word for option in options.items() for word in option]
    with (tmp_path / "output").open("wb") as output:
        driver = cluster.start_driver([ray_script(), "drain-node", *arguments], output=output)
        assert driver.wait(30) == 0


def test_a_stopped_process_is_killed_by_its_id_at_once_by_ray_later(node: AddedNode) -> None:
    by_id, by_ray = start_on(node), start_on(node)
    ray.get([by_id.node_id.remote(), by_ray.node_id.remote()])
    stopped = [process_id_of(by_id), process_id_of(by_ray)]
    pending = [by_id.wait.remote(), by_ray.wait.remote()]
    for one in stopped:
        os.kill(one, signal.SIGSTOP)
    os.kill(stopped[0], signal.SIGKILL)
    with pytest.raises(ActorDiedError):
        ray.get(pending[0], timeout=30)
    ray.kill(by_ray)
    with pytest.raises(ActorDiedError):
        ray.get(pending[1], timeout=30)
    assert exists(stopped[1])
    wait_until(lambda: None if exists(stopped[1]) else "gone", limit_s=30)


def test_a_process_drives_one_cluster_and_then_again_the_one_before(own: Cluster) -> None:
    with own_cluster(num_cpus=3, variables={}) as other, other.connected():
        assert ray.cluster_resources()["CPU"] == 3
    assert ray.get_runtime_context().gcs_address == own.head.address
    assert ray.cluster_resources()["CPU"] == 1


OWNER = """
import os, signal, sys
from pathlib import Path
from guard import descendants
from tests.autoscaling import autoscaling_cluster
from tests.clusters import own_cluster
with autoscaling_cluster(num_cpus=1, cpus_per_node=1, max_workers=1) as scaling:
    scaling.cluster.add_node(num_cpus=1)
    scaling.cluster.start_driver(["sleep", "1000"], output=sys.stdout.buffer)
    print(*descendants(os.getpid()), flush=True)
    if sys.argv[1] == "is killed":
        os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("what", ["ends", "is killed"])
def test_nothing_is_left_when_the_owner(what: str) -> None:
    with tempfile.TemporaryDirectory(prefix="xdist-") as directory:
        output = subprocess.run(
            [sys.executable, "-c", OWNER, what],
            env={**os.environ, "TMPDIR": directory, "PYTHONPATH": f"{ROOT}:{ROOT / 'jobs'}"},
            stdout=subprocess.PIPE,
            check=False,
        ).stdout
        process_ids = [int(word) for word in output.split()]
        assert len(process_ids) > 10
        wait_until(lambda: None if any(map(exists, process_ids)) else "gone", limit_s=30)
        wait_until(lambda: None if os.listdir(directory) else "gone", limit_s=15)
