"""The cluster that adds nodes by itself."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import ray
from ray.autoscaler.sdk import request_resources
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from tests.autoscaling import AutoscalingCluster, autoscaling_cluster
from tests.clusters import wait_until

pytestmark = [pytest.mark.faults, pytest.mark.ray, pytest.mark.timeout(120)]
LIMIT_S = 30
IDLE_S = 5
"""A node that has just come may be idle for a second or two, until somebody starts there."""


class Actor:
    def ready(self) -> None:
        """Return when it runs."""


@pytest.fixture
def scaling() -> Iterator[AutoscalingCluster]:
    with autoscaling_cluster(
        num_cpus=1, cpus_per_node=1, max_workers=1, idle_timeout_s=IDLE_S
    ) as started:
        yield started


def start_in(group: PlacementGroup) -> Any:
    actor_class: Any = ray.remote(Actor)
    scheduling = PlacementGroupSchedulingStrategy(group)
    return actor_class.options(num_cpus=1, scheduling_strategy=scheduling).remote()


def wait_for_nodes(count: int) -> None:
    def attempt() -> bool | None:
        return sum(node["Alive"] for node in ray.nodes()) == count or None

    wait_until(attempt, limit_s=LIMIT_S)


def test_nodes_come_for_pending_placement_groups_up_to_the_limit_of_the_file(
    scaling: AutoscalingCluster,
) -> None:
    with scaling.cluster.connected():
        groups = [placement_group([{"CPU": 1}]) for _ in range(3)]
        actors = [start_in(group) for group in groups]
        ready = [actor.ready.remote() for actor in actors]
        done, pending = ray.wait(ready, num_returns=2, timeout=LIMIT_S)
        assert len(done) == 2
        assert ray.wait(pending, timeout=3) == ([], pending)
        scaling.set_max_workers(2)
        ray.get(pending, timeout=LIMIT_S)
        for group in groups:
            remove_placement_group(group)
        wait_for_nodes(1)


def test_requested_resources_outlive_their_driver_and_end_with_an_empty_request(
    scaling: AutoscalingCluster,
) -> None:
    with scaling.cluster.connected():
        request_resources(bundles=[{"CPU": 1}] * 2)
        wait_for_nodes(2)
    with scaling.cluster.connected():
        # Without the request it would go in the while, as the last line shows.
        assert placement_group([{"CPU": 9}]).wait(IDLE_S + 5) is False
        wait_for_nodes(2)
        request_resources(bundles=[])
        wait_for_nodes(1)
