"""Where workers go when there is not room for all."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pytest
from ray.util.placement_group import (
    placement_group,
    placement_group_table,
    remove_placement_group,
)

from tests.clusters import QUICK_HEALTH_CHECKS, AddedNode, own_cluster, wait_until
from tests.recorded import Planned, Recording, kill_self, recorded_topology
from tests.small_runs import NUM_TRAIN, causes, run, small_config
from xdist.config import ClusterConfig, TrainConfig
from xdist.errors import NotEnoughResources
from xdist.servers_config import ServersConfig
from xdist.strategies import UpdateStrategy
from xdist.topologies import nodes
from xdist.topologies.actors import end
from xdist.topologies.all_reduce import AllReduceTopology, all_reduce_strategy
from xdist.topologies.room import Room

pytestmark = [pytest.mark.ray, pytest.mark.timeout(120)]


def large_workers(directory: Path) -> TrainConfig:
    """Two workers of which there is room for one: the cluster has 8 CPUs."""
    cluster = ClusterConfig(cpus_per_worker=5, gpus_per_worker=0, wait_s=2)
    return replace(small_config(directory, strategy="all_reduce"), cluster=cluster)


@contextmanager
def held(num_cpus: int) -> Iterator[None]:
    """Somebody else has so many CPUs."""
    others = placement_group([{"CPU": num_cpus}])
    assert others.wait(10)
    try:
        yield
    finally:
        remove_placement_group(others)


@pytest.mark.usefixtures("cluster")
def test_without_room_for_all_there_is_none(tmp_path: Path) -> None:
    with pytest.raises(NotEnoughResources, match="no room for 2 workers"):
        Room(large_workers(tmp_path), num_workers=2, fewest_workers=2)


@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize("wait_s", [0.0, 0.9])
def test_who_is_not_waited_for_has_a_place_where_there_is_room(
    tmp_path: Path, wait_s: float
) -> None:
    """Ray takes a wait of less than a second for none."""
    cluster = ClusterConfig(gpus_per_worker=0, wait_s=wait_s)
    config = small_config(tmp_path, strategy="all_reduce", cluster=cluster)
    room = Room(config, num_workers=2, fewest_workers=2)
    assert room.has_place(0)
    assert room.has_place(1)
    room.close()


@pytest.mark.usefixtures("cluster")
def test_after_a_loss_the_fewest_that_may_train_are_enough(tmp_path: Path) -> None:
    room = Room(large_workers(tmp_path), num_workers=2, fewest_workers=1)
    wait_until(lambda: room.has_place(0) or None)
    assert not room.has_place(1)
    room.close()


@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize("strategy", ["all_reduce", "push_pull"])
def test_as_many_as_fit_are_fewer_where_somebody_else_holds_what_there_is(
    tmp_path: Path, strategy: str
) -> None:
    """The cluster has 8 CPUs."""
    cluster = ClusterConfig(cpus_per_server=0, wait_s=3)
    config = small_config(tmp_path, strategy=strategy, cluster=cluster, num_workers="auto")
    config = replace(config, batch_size=16)
    with held(6):
        summary = run(config, tmp_path / "run")
    assert summary.num_samples == 2 * NUM_TRAIN


@pytest.mark.usefixtures("cluster")
def test_a_run_begins_without_the_replicas_for_which_there_is_no_room(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What others leave of 8 CPUs is enough for a worker and two servers."""
    cluster = ClusterConfig(cpus_per_server=1, wait_s=3)
    config = small_config(tmp_path, strategy="push_pull", cluster=cluster, num_workers="auto")
    config = replace(config, servers=ServersConfig(replicas=1))
    with held(5):
        summary = run(config, tmp_path / "run")
    assert "replicas not there within 3 s servers=0,1" in caplog.text
    assert summary.num_samples == 2 * NUM_TRAIN


@pytest.mark.usefixtures("cluster")
def test_a_successor_of_another_number_has_a_place_of_its_own(tmp_path: Path) -> None:
    config = small_config(tmp_path, strategy="all_reduce")
    room = Room(config, num_workers=2, fewest_workers=2)
    room.give_back(0)
    actor = room.worker(2, config, num_classes=1, make_strategy=None, make_batches=None)
    wait_until(lambda: room.has_place(2) or None)
    assert not room.has_place(0)
    assert room.node_of(2) == nodes.here()
    assert room.node_of(0) is None
    end([actor])
    room.close()


def notes_its_node(directory: Path, *arguments: Any, **named: Any) -> UpdateStrategy:
    (directory / f"worker-{named['number']}").write_text(nodes.here())
    return all_reduce_strategy(*arguments, **named)


@pytest.fixture(scope="module")
def second_of_two() -> Iterator[AddedNode]:
    """It joined a head which this process drives; each has room for two workers."""
    with own_cluster(num_cpus=2, variables=QUICK_HEALTH_CHECKS) as cluster:
        node = cluster.add_node(num_cpus=2)
        with cluster.connected():
            yield node


@pytest.mark.faults  # It needs a cluster of its own.
@pytest.mark.usefixtures("second_of_two")
@pytest.mark.parametrize(("placement", "num_on_each"), [("PACK", [2]), ("SPREAD", [1, 1])])
def test_workers_share_few_nodes_or_are_spread(
    tmp_path: Path, placement: Literal["PACK", "SPREAD"], num_on_each: list[int]
) -> None:
    config = small_config(
        tmp_path, strategy="all_reduce", max_steps=1, cluster=ClusterConfig(placement=placement)
    )
    make = partial(AllReduceTopology, make_strategy=partial(notes_its_node, tmp_path))
    run(config, tmp_path / "run", topologies={"all_reduce": make})
    found = Counter(path.read_text() for path in tmp_path.glob("worker-*"))
    assert sorted(found.values()) == num_on_each


@pytest.mark.faults
def test_who_failed_on_a_node_goes_to_another_one_that_has_room(
    tmp_path: Path, second_of_two: AddedNode
) -> None:
    config = small_config(tmp_path, strategy="all_reduce", num_workers=1)
    room = Room(config, num_workers=1, fewest_workers=1)
    both = {nodes.here(), second_of_two.node_id}
    first = room.node_of(0)
    room.look_for_better({0: both})
    assert room.node_of(0) == first
    room.look_for_better({0: {str(first)}})
    assert {wait_until(lambda: room.node_of(0))} == both - {first}
    room.close()


@pytest.mark.faults
def test_a_node_on_which_workers_end_at_once_is_left_and_costs_one_fault(
    tmp_path: Path, second_of_two: AddedNode
) -> None:
    cluster = ClusterConfig(placement="SPREAD")
    config = small_config(tmp_path, strategy="all_reduce", cluster=cluster)
    bad = Planned("bad", None, 1, kill_self, "every_join", second_of_two.node_id)
    recorded = recorded_topology(tmp_path / "recording", [bad], full_size=2)
    run(config, tmp_path / "run", topologies=recorded)
    assert len(causes(tmp_path / "run")) == 1
    assert Recording(tmp_path / "recording").sizes()[-1] == 2


@pytest.mark.faults
def test_who_lost_a_place_waits_in_line_for_the_next_one(
    tmp_path: Path, second_of_two: AddedNode
) -> None:
    """The last test of this cluster. Ray's own way to move it tries again without any pause."""
    config = small_config(tmp_path, strategy="all_reduce", num_workers=4)
    room = Room(config, num_workers=4, fewest_workers=4)
    lost = [number for number in range(4) if room.node_of(number) == second_of_two.node_id]
    (kept, _) = set(range(4)) - set(lost)
    second_of_two.kill()
    wait_until(lambda: None if any(map(room.has_place, lost)) else "lost")
    room.look_for_better(dict.fromkeys(range(4), ()))
    assert {entry["state"] for entry in placement_group_table().values()} == {
        "CREATED",
        "PENDING",
        "REMOVED",
    }
    assert [room.has_place(number) for number in lost] == [False, False]
    room.give_back(kept)
    wait_until(lambda: any(map(room.has_place, lost)) or None)
    room.close()
