"""Runs on clusters that change: nodes are killed, parted, drained, and join."""

from __future__ import annotations

import os
import pickle
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pytest

from datapipe.position import Position
from tests.autoscaling import autoscaling_cluster, raise_max_workers
from tests.clusters import QUICK_HEALTH_CHECKS, AddedNode, Cluster, own_cluster, wait_until
from tests.namespaces import Host, network
from tests.recorded import Planned, Recording, kill_self, recorded_topology
from tests.server_versions import EndsAtOneVersion
from tests.small_runs import NUM_TRAIN, causes, final, records, run, saved_step, small_config
from tests.strategies import ActsBefore
from xdist.config import CheckpointConfig, ClusterConfig, TrainConfig
from xdist.errors import RunFailed
from xdist.servers_config import ServersConfig
from xdist.strategies import UpdateStrategy
from xdist.topologies import Outcome, RunPlan, nodes
from xdist.topologies.all_reduce import AllReduceTopology, all_reduce_strategy
from xdist.topologies.push_pull import PushPullTopology, push_pull_strategy

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


def test_a_run_begins_where_a_node_has_just_died(
    tmp_path: Path, own: Cluster, caplog: pytest.LogCaptureFixture
) -> None:
    """The cluster still lists it."""
    own.add_node(num_cpus=1).kill()
    config = replace(config_of(tmp_path), num_epochs=2)
    run(config, tmp_path / "run")
    assert "is left out" in caplog.text
    assert final(tmp_path / "run").manifest.cut.position == Position(epoch=2)


@pytest.mark.by_hand
def test_a_run_that_is_given_again_begins_without_a_node_that_is_gone(tmp_path: Path) -> None:
    config = config_of(tmp_path, cluster=ClusterConfig(wait_s=20))
    with own_cluster(num_cpus=1, variables=QUICK_HEALTH_CHECKS) as cluster:
        node = cluster.add_node(num_cpus=1)
        with cluster.connected():
            run(replace(config, max_steps=4), tmp_path / "run")
            node.kill()
            wait_until(lambda: None if node.node_id in nodes.others() else "gone")
            run(config, tmp_path / "run")
    assert [group["num_workers"] for group in records(tmp_path / "run", "group")] == [2, 1]
    assert final(tmp_path / "run").manifest.cut.position == Position(epoch=config.num_epochs)


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


@pytest.mark.long
def test_where_the_node_of_the_driver_is_drained_all_is_saved_and_the_run_ends(
    tmp_path: Path,
) -> None:
    """It would end with the node. The same command goes on."""
    config = config_of(tmp_path, num_workers=2, cluster=ClusterConfig(placement="SPREAD"))
    with own_cluster(num_cpus=1, variables=QUICK_HEALTH_CHECKS) as cluster:
        cluster.add_node(num_cpus=1)
        with cluster.connected():
            head = AddedNode(nodes.here(), 0, cluster.head.address)
            drain = partial(head.drain, deadline_s=120)
            planned = Planned("drain", None, 10, drain, node_id=head.node_id)
            topologies = recorded_topology(tmp_path / "recording", [planned])
            with pytest.raises(RunFailed, match="the node of the driver is being drained"):
                run(config, tmp_path / "run", topologies=topologies)
            assert nodes.draining() == {head.node_id}
    recording = Recording(tmp_path / "recording")
    recording.check(num_samples=NUM_TRAIN)
    assert recording.sizes() == [2]
    assert causes(tmp_path / "run") == []
    assert saved_step(tmp_path / "run") == max(recording.steps()) >= 10


def test_where_all_are_on_nodes_with_a_notice_what_there_is_is_saved_before_they_go(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """No checkpoint and no report is due."""
    saving = CheckpointConfig(every_samples=10**6, evaluate_every=0)
    config = config_of(tmp_path, num_workers=2, checkpoint=saving, report_every_steps=100)
    config = replace(config, cluster=ClusterConfig(wait_s=60))
    recording = tmp_path / "recording"
    with own_cluster(num_cpus=0, variables=QUICK_HEALTH_CHECKS) as cluster:
        node = cluster.add_node(num_cpus=2)

        def die_when_saved() -> None:
            wait_until(lambda: saved_step(tmp_path / "run") >= 10 or None)
            node.kill()

        def add_node_then() -> None:
            wait_until(lambda: (recording / "die").exists() or None)
            cluster.add_node(num_cpus=2)

        drain = partial(node.drain, deadline_s=120)
        planned = [
            Planned("drain", None, 10, drain, node_id=node.node_id),
            Planned("die", None, 30, die_when_saved, node_id=node.node_id),
        ]
        with cluster.connected(), ThreadPoolExecutor(1) as beside:
            added = beside.submit(add_node_then)
            topologies = recorded_topology(recording, planned, num_slow_steps=29, slow_until="die")
            run(config, tmp_path / "run", topologies=topologies)
            added.result()
    assert final(tmp_path / "run").manifest.cut.position == Position(epoch=config.num_epochs)
    [step] = re.findall(r"run set back to its last checkpoint step=(\d+)", caplog.text)
    assert 10 <= int(step) < 30
    assert caplog.text.count("what there is is saved") == 1


@pytest.mark.parametrize(
    ("num_workers", "sizes", "changes"),
    [
        (1, [1, 1, 1], {"num_lanes": 1, "on_resize": "keep_worker_batch"}),
        pytest.param(1, [1, 1, 1], {}, marks=pytest.mark.by_hand),
        pytest.param(3, [3, 3], {}, marks=pytest.mark.by_hand),
    ],
)
def test_who_is_needed_leaves_a_drained_node_when_another_is_there(
    tmp_path: Path, num_workers: int, sizes: list[int], changes: dict[str, Any]
) -> None:
    """There is room for another only on a node that joins when the drain has begun. A single worker
    stops first to save what there is.
    """
    recording = tmp_path / "recording"
    cluster_config = ClusterConfig(min_world_size=num_workers)
    config = config_of(tmp_path, num_workers=num_workers, cluster=cluster_config)
    config = replace(config, **changes)
    with own_cluster(num_cpus=num_workers - 1, variables=QUICK_HEALTH_CHECKS) as cluster:
        node = cluster.add_node(num_cpus=1)
        begins = partial(node.drain, deadline_s=120)
        planned = Planned("drain", None, 10, begins, node_id=node.node_id)

        def add_node_then() -> None:
            wait_until(lambda: (recording / "drain").exists() or None)
            cluster.add_node(num_cpus=1)

        with cluster.connected(), ThreadPoolExecutor(1) as beside:
            added = beside.submit(add_node_then)
            # The successor has the first number that is free.
            topologies = recorded_topology(
                recording, [planned], num_slow_steps=100, slow_until=f"ready-{num_workers}"
            )
            run(config, tmp_path / "run", topologies=topologies)
            added.result()
    assert check(config, tmp_path).sizes() == sizes
    assert causes(tmp_path / "run") == []
    train = records(tmp_path / "run", "train")
    assert max(record["num_workers"] for record in train) == num_workers


@pytest.mark.by_hand
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


@pytest.mark.parametrize(
    "dies",
    [pytest.param(False, marks=pytest.mark.long), pytest.param(True, marks=pytest.mark.by_hand)],
)
def test_an_asynchronous_worker_starts_anew_elsewhere_when_its_node_is_drained(
    tmp_path: Path, dies: bool
) -> None:
    config = small_config(
        tmp_path, strategy="push_pull", num_epochs=8, cluster=ClusterConfig(placement="SPREAD")
    )
    with own_cluster(num_cpus=1, variables=QUICK_HEALTH_CHECKS) as cluster:
        added = [cluster.add_node(num_cpus=1) for _ in range(2)]
        act = drain_and_die if dies else partial(AddedNode.drain, deadline_s=300)
        acts = {node.node_id: partial(act, node) for node in added}
        make_strategy = partial(acts_on_its_node, acts, tmp_path)
        with cluster.connected():
            make = partial(PushPullTopology, make_strategy=make_strategy)
            run(config, tmp_path / "run", topologies={"push_pull": make})
    assert len(list(tmp_path.glob("worker-*"))) == 3
    assert len(causes(tmp_path / "run")) == dies
    assert final(tmp_path / "run").manifest.cut.position == Position(epoch=config.num_epochs)


class DrainsAServer(EndsAtOneVersion):
    """A topology in which a node is drained that has a server or a replica; workers wait until none
    is there any more, and each has its replica, if the run has some.
    """

    def __init__(self, plan: RunPlan, *, added: Sequence[AddedNode], settled: Path) -> None:
        super().__init__(plan, make_strategy=partial(waits_for, settled))
        self._added = {node.node_id: node for node in added}
        self._settled = settled
        self._drained: AddedNode | None = None

    def watch(self) -> Outcome:
        outcome: Outcome = self._topology.watch()
        servers = self._topology._servers
        num_replicas = self._plan.config.servers.replicas * len(servers.primaries)
        if servers.is_led and len(servers._attached) == num_replicas:
            places = {hand.process.node_id for hand in servers if hand.process is not None}
            if self._drained is None:
                self._drained = self._added[min(places & self._added.keys())]
                self._drained.drain(deadline_s=300)
            elif self._drained.node_id not in places:
                self._settled.touch()
        return outcome


def waits_for(file: Path, *arguments: Any, number: int) -> ActsBefore:
    strategy = push_pull_strategy(*arguments, number=number)
    marker = file.with_name(f"waited-{number}")
    return ActsBefore(strategy, 5, marker, lambda: wait_until(lambda: file.exists() or None))


@pytest.mark.parametrize("replicas", [0, pytest.param(1, marks=pytest.mark.by_hand)])
def test_servers_leave_a_node_that_is_drained(
    tmp_path: Path, replicas: Literal[0, 1], caplog: pytest.LogCaptureFixture
) -> None:
    """What they have is saved first, where there is no replica."""
    cluster_config = ClusterConfig(placement="SPREAD", cpus_per_server=1)
    config = small_config(tmp_path, strategy="push_pull", cluster=cluster_config)
    config = replace(config, servers=ServersConfig(replicas=replicas))
    with own_cluster(num_cpus=2, variables=QUICK_HEALTH_CHECKS) as cluster:
        added = [cluster.add_node(num_cpus=2) for _ in range(2 + replicas)]
        with cluster.connected():
            make = partial(DrainsAServer, added=added, settled=tmp_path / "settled")
            run(config, tmp_path / "run", topologies={"push_pull": make})
    assert (tmp_path / "settled").exists()
    assert causes(tmp_path / "run") == []
    assert ("what there is is saved" in caplog.text) == (replicas == 0)
    assert "set back" not in caplog.text
    assert final(tmp_path / "run").manifest.cut.position == Position(epoch=2)


def acts_on_its_node(
    acts: Mapping[str, Callable[[], object]], directory: Path, *arguments: Any, number: int
) -> ActsBefore:
    """The first worker that is on such a node acts; the others wait for a third worker, so that the
    run does not end before.
    """
    (directory / f"worker-{number}-{os.getpid()}").touch()
    strategy = push_pull_strategy(*arguments, number=number)
    here = nodes.here()

    def wait_for_the_third() -> None:
        wait_until(
            lambda: len(list(directory.glob("worker-*"))) == 3 or here in nodes.draining() or None
        )

    waiting = ActsBefore(strategy, 20, directory / f"waited-{number}", wait_for_the_third)
    if here not in acts:
        return waiting
    act = partial(first_of_all, directory / "first", acts[here])
    return ActsBefore(waiting, 10, directory / f"acted-{number}", act)


def first_of_all(marker: Path, act: Callable[[], object]) -> None:
    with suppress(FileExistsError):
        marker.touch(exist_ok=False)
        act()


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
        topologies = recorded_topology(
            tmp_path / "recording", [planned], num_slow_steps=100, slow_until="ready-2"
        )
        run(config, tmp_path / "run", topologies=topologies)
        recording = check(config, tmp_path)
        assert recording.sizes() == [1, 2, 3]
        assert causes(tmp_path / "run") == []
        assert len(list((tmp_path / "recording").glob("worker-*"))) == 3
        groups = records(tmp_path / "run", "group")
        raised = (tmp_path / "recording" / "raise").stat().st_mtime
        assert groups[-1]["time"] - raised < 60


def run_on_hosts(
    directory: Path, hosts: Sequence[Host], config: TrainConfig, act: Callable[[], object]
) -> None:
    """A recorded run with a driver and, if there is room for it, a worker on the first host, and a
    worker on each other one. Before step 10 a worker acts.
    """
    first, *others = hosts
    num_cpus = int(config.num_workers == len(hosts))
    with (
        own_cluster(num_cpus=num_cpus, variables=QUICK_HEALTH_CHECKS, host=first) as cluster,
        (directory / "output").open("wb") as output,
    ):
        for other in others:
            cluster.add_node(num_cpus=1, host=other)
        (directory / "arguments.pkl").write_bytes(pickle.dumps((config, act)))
        command = [sys.executable, "-m", "tests.parted_run", str(directory)]
        assert cluster.start_driver(command, output=output).wait() == 0


def test_the_side_of_the_driver_goes_on_when_the_network_parts(tmp_path: Path) -> None:
    config = config_of(
        tmp_path, num_workers=2, cluster=ClusterConfig(collective_timeout_s=3, placement="SPREAD")
    )
    with network(2) as hosts:
        run_on_hosts(tmp_path, hosts, config, hosts[1].take_link_down)
    assert check(config, tmp_path).sizes() == [2, 1]
    assert len(causes(tmp_path / "run")) >= 1


@pytest.mark.by_hand
def test_who_reaches_the_driver_and_not_its_peers_does_not_hold_them_up(tmp_path: Path) -> None:
    config = config_of(
        tmp_path, num_workers=3, cluster=ClusterConfig(collective_timeout_s=3, placement="SPREAD")
    )
    with network(4) as hosts:
        run_on_hosts(
            tmp_path, hosts, config, partial(part_from_all, hosts[2], [*hosts[1:2], hosts[3]])
        )
    recording = check(config, tmp_path)
    assert recording.steps()[9][1] == 3
    assert {size for step, (_, size) in recording.steps().items() if step > 10} == {2}
    first, second, *others = causes(tmp_path / "run")
    assert first == "link lost"
    assert second.startswith("worker ")
    assert set(others) <= {second}


def part_from_all(host: Host, others: Sequence[Host]) -> None:
    for other in others:
        host.part_from(other)


@pytest.mark.by_hand
def test_a_spare_has_the_seat_of_who_lost_its_place_before_the_first_group(tmp_path: Path) -> None:
    cluster_config = ClusterConfig(num_spares=1, min_world_size=1, wait_s=5, placement="SPREAD")
    config = config_of(tmp_path, num_workers=2, cluster=cluster_config)
    with own_cluster(num_cpus=1, variables=QUICK_HEALTH_CHECKS) as cluster:
        added = [cluster.add_node(num_cpus=1) for _ in range(2)]
        kills = {node.node_id: node.kill for node in added}
        make_strategy = partial(kills_its_node, kills, tmp_path)
        with cluster.connected():
            make = partial(AllReduceTopology, make_strategy=make_strategy)
            run(config, tmp_path / "run", topologies={"all_reduce": make})
    assert [group["num_workers"] for group in records(tmp_path / "run", "group")] == [2]
    assert len(causes(tmp_path / "run")) == 1
    assert final(tmp_path / "run").manifest.cut.position == Position(epoch=config.num_epochs)


def kills_its_node(
    kills: Mapping[str, Callable[[], object]], directory: Path, *arguments: Any, **named: Any
) -> UpdateStrategy:
    """When all three have begun to start, the first of the two workers on such a node kills it."""
    number, here = named["number"], nodes.here()
    (directory / f"started-{number}").touch()
    if number < 2 and here in kills:
        wait_until(lambda: len(list(directory.glob("started-*"))) == 3 or None)
        first_of_all(directory / "first", kills[here])
    return all_reduce_strategy(*arguments, **named)
