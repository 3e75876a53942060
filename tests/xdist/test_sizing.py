"""A run takes what the cluster has, and says what is missing."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from datapipe.config import DataConfig
from xdist.compute_config import ComputeConfig
from xdist.config import ClusterConfig, TrainConfig
from xdist.errors import NotEnoughResources, UserError
from xdist.evaluation_config import EvaluationConfig
from xdist.servers_config import ServersConfig
from xdist.sizing import most_images_of_a_worker, num_lanes, sized

SYNC = TrainConfig(
    data=DataConfig(train="somewhere"),
    strategy="all_reduce",
    loss="softmax",
    batch_size=64,
    num_epochs=1,
)
ASYNC = replace(SYNC, strategy="push_pull")


def test_auto_is_a_worker_a_cpu_and_two_servers() -> None:
    config = sized(ASYNC, [{"CPU": 2.0}])
    assert (config.num_workers, config.num_servers) == (2, 2)
    assert config.cluster.gpus_per_worker == 0


def test_auto_is_a_worker_a_gpu_where_there_are_some() -> None:
    config = sized(ASYNC, [{"CPU": 600.0, "GPU": 60.0}])
    assert (config.num_workers, config.num_servers) == (60, 8)
    assert config.cluster.gpus_per_worker == 1


def test_a_synchronous_run_has_no_servers_and_no_more_workers_than_samples() -> None:
    config = sized(SYNC, [{"CPU": 100.0}])
    assert (config.num_workers, config.num_servers) == (64, "auto")


def test_too_many_workers_are_refused_with_what_is_missing() -> None:
    with pytest.raises(
        NotEnoughResources,
        match=r"5 workers of 1 CPU and 2 servers .* has 2 CPU",
    ):
        sized(replace(ASYNC, num_workers=5), [{"CPU": 2.0}])


def test_fewer_workers_than_asked_for_may_be_enough() -> None:
    two = replace(SYNC, num_workers=5, cluster=ClusterConfig(min_world_size=2))
    assert sized(two, [{"CPU": 2.0}], resumes=True).num_workers == 5
    with pytest.raises(NotEnoughResources, match="5 workers of 1 CPU do not fit"):
        sized(two, [{"CPU": 2.0}])
    three = replace(two, cluster=ClusterConfig(min_world_size=3))
    with pytest.raises(NotEnoughResources, match="3 workers of 1 CPU do not fit"):
        sized(three, [{"CPU": 2.0}], resumes=True)


def test_a_cluster_without_room_for_one_worker_is_refused() -> None:
    with pytest.raises(NotEnoughResources, match="1 workers of 4 CPU"):
        sized(replace(ASYNC, cluster=ClusterConfig(cpus_per_worker=4)), [{"CPU": 2.0}])


def test_servers_that_reserve_cpus_count() -> None:
    cluster = ClusterConfig(cpus_per_server=1)
    assert sized(replace(ASYNC, cluster=cluster), [{"CPU": 6.0}]).num_workers == 4
    replicas = ServersConfig(replicas=1)
    assert sized(replace(ASYNC, cluster=cluster, servers=replicas), [{"CPU": 6.0}]).num_workers == 2
    with pytest.raises(NotEnoughResources, match=r"2 servers, with replicas, of 1 CPU do not fit"):
        sized(replace(ASYNC, cluster=cluster, servers=replicas), [{"CPU": 4.0}])
    with pytest.raises(NotEnoughResources, match=r"2 servers of 50 CPU do not fit"):
        sized(replace(ASYNC, cluster=ClusterConfig(cpus_per_server=50)), [{"CPU": 6.0}])


def test_scoring_that_reserves_a_gpu_leaves_it_out_for_workers() -> None:
    scored = replace(
        SYNC,
        data=DataConfig(train="somewhere", evaluation="elsewhere"),
        evaluation=EvaluationConfig(num_cpus=2, num_gpus=1),
    )
    nodes = [{"CPU": 16.0, "GPU": 4.0}] * 2
    assert sized(scored, nodes).num_workers == 7
    assert sized(replace(scored, data=SYNC.data), nodes).num_workers == 8
    with pytest.raises(
        NotEnoughResources, match=r"and scoring of 2 CPU and 1 GPU do not fit.*lower"
    ):
        sized(replace(scored, num_workers=8), nodes)


def test_servers_that_reserve_gpus_leave_them_out_for_workers() -> None:
    config = replace(ASYNC, cluster=ClusterConfig(gpus_per_server=1))
    nodes = [{"CPU": 8.0, "GPU": 4.0}]
    assert sized(config, nodes).num_workers == 2
    with pytest.raises(NotEnoughResources, match=r"2 servers of 0 CPU and 1 GPU do not fit"):
        sized(config, [{"CPU": 8.0, "GPU": 2.0}])


def test_a_worker_fits_on_one_node_or_not_at_all() -> None:
    cluster = ClusterConfig(cpus_per_worker=4)
    nodes = [{"CPU": 6.0}, {"CPU": 6.0}]
    assert sized(replace(ASYNC, cluster=cluster), nodes).num_workers == 2
    with pytest.raises(NotEnoughResources, match=r"has 12 CPU and 0 GPU on 2 nodes"):
        sized(replace(ASYNC, cluster=cluster, num_workers=3), nodes)


def test_shares_of_a_cpu_add_up() -> None:
    config = replace(ASYNC, cluster=ClusterConfig(cpus_per_worker=0.1))
    assert sized(config, [{"CPU": 1.0}]).num_workers == 10


@pytest.mark.parametrize(("workers", "lanes"), [(1, 4), (2, 8), (3, 16), (60, 64)])
def test_lanes_divide_the_batch_and_are_about_four_a_worker(workers: int, lanes: int) -> None:
    assert num_lanes(SYNC, num_workers=workers) == lanes


def test_fewer_lanes_than_workers_are_refused() -> None:
    with pytest.raises(
        UserError, match="num_lanes is 2; allowed: at least 4, the most that there may"
    ):
        num_lanes(replace(SYNC, num_lanes=2), num_workers=4)


def test_where_workers_keep_their_batch_each_has_as_many_lanes() -> None:
    config = replace(SYNC, on_resize="keep_worker_batch", batch_size=96)
    assert num_lanes(config, num_workers=3) == 12
    assert num_lanes(config, num_workers=48) == 96
    with pytest.raises(UserError, match="batch_size is 96; allowed: multiples of 5 workers"):
        num_lanes(config, num_workers=5)
    with pytest.raises(UserError, match="num_lanes is 8; allowed: multiples of 3 workers"):
        num_lanes(replace(config, num_lanes=8), num_workers=3)


def test_auto_leaves_room_for_spares_and_stops_at_the_largest_group() -> None:
    spares = ClusterConfig(num_spares=2)
    assert sized(replace(SYNC, cluster=spares), [{"CPU": 8.0}]).num_workers == 6
    largest = ClusterConfig(max_world_size=4)
    assert sized(replace(SYNC, cluster=largest), [{"CPU": 8.0}]).num_workers == 4
    assert sized(replace(SYNC, num_lanes=4), [{"CPU": 8.0}]).num_workers == 4


def test_auto_is_not_less_than_the_smallest_group() -> None:
    smallest = ClusterConfig(min_world_size=4)
    with pytest.raises(NotEnoughResources, match="4 workers of 1 CPU do not fit") as raised:
        sized(replace(SYNC, cluster=smallest), [{"CPU": 2.0}])
    assert "lower cluster.min_world_size or cluster.cpus_per_worker, or" in str(raised.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"compute": ComputeConfig(cuda_graphs=True)}, "compute.cuda_graphs is True"),
        (
            {"batch_size": 2, "num_workers": "auto", "cluster": ClusterConfig(min_world_size=3)},
            "batch_size is 2; allowed: at least num_workers, which is 3",
        ),
    ],
)
def test_what_this_cluster_cannot_do_is_one_message(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=f"on this cluster, {message}"):
        sized(replace(SYNC, **changes), [{"CPU": 4.0}])


@pytest.mark.parametrize(
    ("cpus", "batch_size", "lanes", "expected"),
    [(3.0, 64, None, 2), (3.0, 48, 48, 3), (7.0, 64, None, 4), (7.0, 30, 10, 5)],
)
def test_auto_takes_workers_that_can_all_have_the_same_batch(
    cpus: float, batch_size: int, lanes: int | None, expected: int
) -> None:
    config = replace(SYNC, on_resize="keep_worker_batch", batch_size=batch_size, num_lanes=lanes)
    config = sized(config, [{"CPU": cpus}])
    assert config.num_workers == expected
    assert num_lanes(config, num_workers=expected) % expected == 0


def test_what_a_worker_computes_at_most_while_none_is_lost() -> None:
    five = replace(SYNC, batch_size=60, num_workers=5, num_lanes=12)
    assert most_images_of_a_worker(five) == 15  # Some have three lanes, of five images.
    assert most_images_of_a_worker(replace(five, strategy="push_pull")) == 60
    assert most_images_of_a_worker(replace(five, num_workers="auto")) == 60  # It may be alone.
