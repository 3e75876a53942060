"""Room for workers in the cluster, and the actors themselves."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import Any

import ray
from ray._private.state import state
from ray.actor import ActorHandle
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

from xdist import fork_servers
from xdist.config import ClusterConfig, TrainConfig
from xdist.errors import NotEnoughResources
from xdist.parameter_server import ParameterServer
from xdist.server_plan import ServerPlan
from xdist.worker import Worker

NO_RETRIES = {"max_restarts": 0, "max_task_retries": 0}
"""A push that Ray retried would count twice; an actor that it restarted would have forgotten its
weights.
"""


PLACING_LIMIT_S = 10.0
"""For groups for which there was room a moment ago, or is if they are fewer."""
PLACING_PAUSE_S = 0.1
"""Between two tries to have a place on a certain node."""
CONTROL = "control"
"""The methods of a worker that are called beside all others, as in `Worker.pulse`."""
NUM_CONTROL_THREADS = 2


def worker_bundle(cluster: ClusterConfig) -> dict[str, float]:
    """What a worker reserves."""
    gpus = cluster.gpus_per_worker
    return _bundle(cluster.cpus_per_worker, gpus if isinstance(gpus, int) else 0)


def _bundle(cpus: float, gpus: int) -> dict[str, float]:
    """Ray wants no zeros in it."""
    return {name: amount for name, amount in (("CPU", cpus), ("GPU", float(gpus))) if amount}


class Room:
    """A placement group of one bundle for each worker, and for each server that reserves CPUs.

    All are found a place together, packed or spread, or none is: `NotEnoughResources` when there is
    no room within `cluster.wait_s`. Each then has a group of its own there, so that a worker can
    give its place back. A group belongs to the number of its worker: when its node dies, Ray moves
    it to another one, if there is room. Where there is none, ask for another: it waits in line, and
    the autoscaler hears of it, while a moving one has Ray (2.60) try again without any pause.
    """

    def __init__(
        self,
        config: TrainConfig,
        *,
        num_workers: int,
        num_servers: int = 0,
        num_replicas: int = 0,
        fewest_workers: int | None = None,
    ) -> None:
        """fewest_workers: that are found a place together, with the servers, where there is none
        for all at once; the others get theirs when there is room.
        """
        cluster = config.cluster
        remote: Any = ray.remote  # Its types do not know concurrency_groups.
        self._worker_class = remote(concurrency_groups={CONTROL: NUM_CONTROL_THREADS})(Worker)
        self._bundle = worker_bundle(cluster)
        self._server_bundle = _bundle(cluster.cpus_per_server, cluster.gpus_per_server)
        if not self._server_bundle:
            num_servers = num_replicas = 0
        workers = [self._bundle] * num_workers
        servers = [self._server_bundle] * (num_servers + num_replicas)
        wait_s = cluster.wait_s
        if fewest_workers is None:
            places = _places_for(workers, servers, config, wait_s=wait_s)
        else:
            try:
                at_once_s = min(wait_s, PLACING_LIMIT_S)
                places = _places_for(workers, servers, config, wait_s=at_once_s)
            except NotEnoughResources:
                workers, servers = workers[:fewest_workers], servers[:num_servers]
                places = _places_for(workers, servers, config, wait_s=wait_s)
        self.num_together = num_workers = len(workers)
        """Workers that were found a place together."""
        # Ray tries a group of somebody who comes later at once, and these again after a while: they
        # have their places first, unless somebody else was faster, for whom nobody waits here.
        deadline = time.monotonic() + PLACING_LIMIT_S
        self._workers = {
            number: _one_at(place, self._bundle, deadline=deadline)
            for number, place in enumerate(places[:num_workers])
        }
        self._server_places = places[num_workers:]
        self._servers: dict[ActorHandle[Any], PlacementGroup] = {}

    def worker(self, number: int, config: TrainConfig, **arguments: Any) -> ActorHandle[Any]:
        """A worker actor in the bundle of this number; `arguments` are those of `Worker`. One that
        comes later starts when there is room.
        """
        actor_class: Any = self._worker_class.options(
            **NO_RETRIES,
            num_cpus=self._bundle.get("CPU", 0),
            num_gpus=self._bundle.get("GPU", 0),
            scheduling_strategy=self._of_worker(number),
            **fork_servers.options(config.cluster),
        )
        actor: ActorHandle[Any] = actor_class.remote(config, number=number, **arguments)
        return actor

    def give_back(self, number: int) -> None:
        """The worker of this number leaves its place; the next one gets another."""
        if number in self._workers:
            remove_placement_group(self._workers.pop(number))

    def server(self, number: int, plan: ServerPlan, *, near: str | None) -> ActorHandle[Any]:
        """A parameter server actor in a bundle of its own, if it reserves anything.

        near: the node that it is to be on, if it can; None: where there was room for the server of
        this number, or anywhere.
        """
        if not self._server_bundle:
            where = None if near is None else NodeAffinitySchedulingStrategy(near, soft=True)
            return _server(plan, {}, where=where)
        group = _one(self._server_bundle, near=near or self._server_places[number])
        actor = _server(plan, self._server_bundle, where=_within(group))
        self._servers[actor] = group
        return actor

    def end_server(self, actor: ActorHandle[Any]) -> None:
        """End a server; its place is free."""
        end([actor])
        if actor in self._servers:
            remove_placement_group(self._servers.pop(actor))

    def has_place(self, number: int) -> bool:
        """Whether the worker of this number has a place; not while its node is lost."""
        return self._state_of(number) == "CREATED"

    def ask_where_lost(self, numbers: Iterable[int]) -> None:
        """Ask for another place for those of these workers whose node is lost."""
        for number in numbers:
            if self._state_of(number) == "RESCHEDULING":
                self._ask_for_another(number)

    def _ask_for_another(self, number: int) -> None:
        self.give_back(number)
        self._workers[number] = _one(self._bundle)

    def _state_of(self, number: int) -> str | None:
        group = self._workers.get(number)
        return None if group is None else placement_group_table(group)["state"]

    def node_of(self, number: int) -> str | None:
        """The id of the node where the place of this worker is; None while it has none."""
        group = self._workers.get(number)
        return None if group is None else _node_of(group)

    def _of_worker(self, number: int) -> PlacementGroupSchedulingStrategy:
        is_draining = self.node_of(number) in state.get_draining_nodes()
        if number not in self._workers or is_draining:  # Nobody starts there any more.
            self._ask_for_another(number)
        self.ask_where_lost([number])
        return _within(self._workers[number])

    def close(self) -> None:
        for group in (*self._workers.values(), *self._servers.values()):
            remove_placement_group(group)


def _places_for(
    workers: list[dict[str, float]],
    servers: list[dict[str, float]],
    config: TrainConfig,
    *,
    wait_s: float,
) -> list[str]:
    """The nodes on which there is room for all bundles at once. Raises `NotEnoughResources`."""
    bundles = [*workers, *servers]
    group = placement_group(bundles, strategy=config.cluster.placement)
    try:
        if not group.wait(wait_s):
            free = ray.available_resources()
            raise NotEnoughResources(
                f"no room for {len(workers)} workers and {len(servers)} servers "
                f"within {wait_s:g} s (cluster.wait_s); free now: {free.get('CPU', 0):g} CPU and "
                f"{free.get('GPU', 0):g} GPU; end what else runs, lower num_workers, or add nodes"
            )
        nodes: dict[int, str] = placement_group_table(group)["bundles_to_node_id"]
        return [nodes[number] for number in range(len(bundles))]
    finally:
        remove_placement_group(group)


def _one(bundle: dict[str, float], *, near: str | None = None) -> PlacementGroup:
    """A group of one bundle, on that node if it can be."""
    group: PlacementGroup = placement_group(
        [bundle], strategy="STRICT_PACK", _soft_target_node_id=near
    )
    return group


def _one_at(node: str, bundle: dict[str, float], *, deadline: float) -> PlacementGroup:
    """The same, which has its place: on that node, as soon as what was found a place there before
    has left it, or after the deadline anywhere.
    """
    while True:
        group = _one(bundle, near=node)
        group.wait(max(0.0, deadline - time.monotonic()))
        if time.monotonic() > deadline or _node_of(group) == node:
            return group
        remove_placement_group(group)
        time.sleep(PLACING_PAUSE_S)


def _node_of(group: PlacementGroup) -> str | None:
    """The id of the node of its one bundle; None while that has none."""
    found: dict[int, str] = placement_group_table(group)["bundles_to_node_id"]
    return found.get(0) or None


def _within(group: PlacementGroup) -> PlacementGroupSchedulingStrategy:
    return PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=0)


def server_on(node: str, plan: ServerPlan) -> ActorHandle[Any]:
    """A parameter server actor on the node of this id, where it reserves nothing."""
    return _server(plan, {}, where=NodeAffinitySchedulingStrategy(node, soft=False))


def _server(plan: ServerPlan, reserved: Mapping[str, float], *, where: Any) -> ActorHandle[Any]:
    actor_class: Any = ray.remote(ParameterServer).options(
        **NO_RETRIES,
        num_cpus=reserved.get("CPU", 0),
        num_gpus=reserved.get("GPU", 0),
        scheduling_strategy=where,
        **fork_servers.options(plan.config.cluster),
    )
    actor: ActorHandle[Any] = actor_class.remote(plan, share=ray.put)
    return actor


def end(actors: Iterable[ActorHandle[Any]]) -> None:
    """Kill actors; those that are gone already stay gone."""
    for actor in actors:
        ray.kill(actor)
