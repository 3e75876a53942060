"""Room for workers in the cluster, and the actors themselves."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.autoscaler.sdk import request_resources
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.scheduling_strategies import (
    NodeAffinitySchedulingStrategy,
    PlacementGroupSchedulingStrategy,
)

from xdist.config import TrainConfig
from xdist.errors import NotEnoughResources
from xdist.parameter_server import ParameterServer, ServerPlan
from xdist.worker import Worker

NO_RETRIES = {"max_restarts": 0, "max_task_retries": 0}
"""A push that Ray retried would count twice; an actor that it restarted would have forgotten its
weights.
"""


CONTROL = "control"
"""The methods of a worker that are called beside all others, as in `Worker.pulse`."""
NUM_CONTROL_THREADS = 2


as_actor: Any = ray.remote  # Its types do not know concurrency_groups.


class Room:
    """A placement group with a bundle for each worker, and for each server that reserves CPUs; and
    one more for every worker that comes later.

    A bundle belongs to the number of its worker. When its node dies, Ray moves it to another one,
    as soon as there is room, and asks the autoscaler for it. Raises `NotEnoughResources` when there
    is none for all within `cluster.wait_s`.
    """

    def __init__(self, config: TrainConfig, *, num_workers: int, num_servers: int = 0) -> None:
        cluster = config.cluster
        self._num_workers = num_workers
        self._has_asked = False
        self._cpus_per_server = cluster.cpus_per_server
        self._bundle = {"CPU": cluster.cpus_per_worker}
        if cluster.gpus_per_worker:
            self._bundle["GPU"] = float(cluster.gpus_per_worker)
        bundles = [self._bundle] * num_workers
        if self._cpus_per_server:
            bundles += [{"CPU": self._cpus_per_server}] * num_servers
        self._group: PlacementGroup = placement_group(bundles, strategy=cluster.placement)
        self._more: dict[int, PlacementGroup] = {}
        if not self._group.wait(cluster.wait_s):
            free = ray.available_resources()
            self.close()
            raise NotEnoughResources(
                f"no room for {num_workers} workers and {num_servers} servers within "
                f"{cluster.wait_s:g} s (cluster.wait_s); free now: {free.get('CPU', 0):g} CPU and "
                f"{free.get('GPU', 0):g} GPU; end what else runs, lower num_workers, or add nodes"
            )

    def worker(self, number: int, config: TrainConfig, **arguments: Any) -> ActorHandle[Any]:
        """A worker actor in the bundle of this number; `arguments` are those of `Worker`. One that
        comes later starts when there is room.
        """
        actor_class: Any = as_actor(concurrency_groups={CONTROL: NUM_CONTROL_THREADS})(
            Worker
        ).options(
            **NO_RETRIES,
            num_cpus=self._bundle["CPU"],
            num_gpus=self._bundle.get("GPU", 0),
            scheduling_strategy=self._of_worker(number),
        )
        actor: ActorHandle[Any] = actor_class.remote(config, number=number, **arguments)
        return actor

    def ask_for(self, num_workers: int) -> None:
        """Have the autoscaler make room for so many workers, until `close`."""
        request_resources(bundles=[self._bundle] * num_workers)
        self._has_asked = True

    def server(self, number: int, plan: ServerPlan) -> ActorHandle[Any]:
        """A parameter server actor, in its bundle, or anywhere if it reserves nothing."""
        where = self._at(self._num_workers + number) if self._cpus_per_server else None
        return _server(plan, num_cpus=self._cpus_per_server, where=where)

    @property
    def is_placed(self) -> bool:
        """Whether all bundles have a place; those of a lost node wait for another one."""
        return bool(placement_group_table(self._group)["state"] == "CREATED")

    def _of_worker(self, number: int) -> PlacementGroupSchedulingStrategy:
        if number < self._num_workers:
            return self._at(number)
        if number not in self._more:
            self._more[number] = placement_group([self._bundle])
        return PlacementGroupSchedulingStrategy(self._more[number], placement_group_bundle_index=0)

    def _at(self, bundle: int) -> PlacementGroupSchedulingStrategy:
        return PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=bundle)

    def close(self) -> None:
        if self._has_asked:
            request_resources(bundles=[])
        for group in (self._group, *self._more.values()):
            remove_placement_group(group)


def server_on(node: str, plan: ServerPlan) -> ActorHandle[Any]:
    """A parameter server actor on the node of this id, where it reserves nothing."""
    return _server(plan, num_cpus=0, where=NodeAffinitySchedulingStrategy(node, soft=False))


def _server(plan: ServerPlan, *, num_cpus: float, where: Any) -> ActorHandle[Any]:
    actor_class: Any = ray.remote(ParameterServer).options(
        **NO_RETRIES, num_cpus=num_cpus, scheduling_strategy=where
    )
    actor: ActorHandle[Any] = actor_class.remote(plan)
    return actor


def end(actors: Iterable[ActorHandle[Any]]) -> None:
    """Kill actors; those that are gone already stay gone."""
    for actor in actors:
        ray.kill(actor)
