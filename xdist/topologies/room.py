"""Room: places in the cluster for the workers and the parameter servers of a run."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
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

from xdist.config import TrainConfig
from xdist.errors import NotEnoughResources
from xdist.server_plan import ServerPlan
from xdist.topologies import actors, nodes

PLACING_LIMIT_S = 10.0
"""For groups for which there was room a moment ago, or is if they are fewer."""
TRYING_LIMIT_S = 2.0
"""For a group for which there may be room."""
PLACING_PAUSE_S = 0.1
"""Between two tries to have a place on a certain node."""
GIVING_BACK_LIMIT_S = 1.0
"""For what a group leaves to be free, if nobody else takes it."""
GIVING_BACK_PAUSE_S = 0.01


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
        fewest_workers: int,
    ) -> None:
        """fewest_workers: that are found a place together, with the servers, where there is none
        for all at once; the others get theirs when there is room.
        """
        self._bundle = actors.worker_bundle(config.cluster)
        self._server_bundle = actors.server_bundle(config.cluster)
        if not self._server_bundle:
            num_servers = num_replicas = 0
        self.num_together, places = self._find_places(
            config,
            num_workers=num_workers,
            num_servers=num_servers,
            num_replicas=num_replicas,
            fewest_workers=fewest_workers,
        )
        """Workers that were found a place together."""
        # Ray tries a group of somebody who comes later at once, and these again after a while: they
        # have their places first, unless somebody else was faster, for whom nobody waits here.
        deadline = time.monotonic() + PLACING_LIMIT_S
        self._workers = {
            number: _one_at(place, self._bundle, deadline=deadline)
            for number, place in enumerate(places[: self.num_together])
        }
        self._server_places = places[self.num_together :]
        self._servers: dict[ActorHandle[Any], PlacementGroup] = {}

    def _find_places(
        self,
        config: TrainConfig,
        *,
        num_workers: int,
        num_servers: int,
        num_replicas: int,
        fewest_workers: int,
    ) -> tuple[int, list[str]]:
        """Workers that are found a place together; the nodes of these, then of the servers."""

        def find(workers: int, servers: int, wait_s: float) -> list[str]:
            bundles = [self._bundle] * workers, [self._server_bundle] * servers
            return _places_for(*bundles, config, wait_s=wait_s)

        wait_s = config.cluster.wait_s
        num_all = num_servers + num_replicas
        if fewest_workers == num_workers:
            return num_workers, find(num_workers, num_all, wait_s)
        with suppress(NotEnoughResources):
            return num_workers, find(num_workers, num_all, min(wait_s, PLACING_LIMIT_S))
        most, too_many = fewest_workers, num_workers
        places = find(most, num_servers, wait_s)
        while too_many - most > 1:
            middle = (most + too_many) // 2
            try:
                most, places = middle, find(middle, num_servers, min(wait_s, TRYING_LIMIT_S))
            except NotEnoughResources:
                too_many = middle
        return most, places

    def worker(self, number: int, config: TrainConfig, **arguments: Any) -> ActorHandle[Any]:
        """A worker actor in the bundle of this number; `arguments` are those of `Worker`. One that
        comes later starts when there is room.
        """
        where = self._of_worker(number)
        return actors.worker(config, self._bundle, where=where, number=number, **arguments)

    def give_back(self, number: int) -> None:
        """The worker of this number leaves its place; the next one gets another."""
        if number in self._workers:
            remove_placement_group(self._workers.pop(number))

    def server(self, number: int, plan: ServerPlan, *, near: str | None) -> ActorHandle[Any]:
        """A parameter server actor in a bundle of its own, if it reserves anything.

        near: the node that it is to be on; if it reserves something, that or another one. None:
        where there was room for the server of this number, or anywhere.
        """
        if not self._server_bundle:
            # Not soft: Ray (2.60) places who reserves nothing anywhere, then.
            where = None if near is None else NodeAffinitySchedulingStrategy(near, soft=False)
            return actors.server(plan, {}, where=where)
        group = _one(self._server_bundle, near=near or self._server_places[number])
        actor = actors.server(plan, self._server_bundle, where=_within(group))
        self._servers[actor] = group
        return actor

    def end_server(self, actor: ActorHandle[Any]) -> None:
        """End a server; its place is free."""
        actors.end([actor])
        if actor in self._servers:
            remove_placement_group(self._servers.pop(actor))

    def has_place(self, number: int) -> bool:
        """Whether the worker of this number has a place; not while its node is lost."""
        return self._state_of(number) == "CREATED"

    def look_for_better(self, failed_on: Mapping[int, Collection[str]]) -> None:
        """Ask for another place for those of these workers whose node is lost, or who have failed
        on it, where another node has room. failed_on: the nodes of each number.
        """
        for number, failed in failed_on.items():
            self._ask_if_lost(number)
            if failed and self.node_of(number) in failed:
                others = nodes.with_room(self._bundle) - set(failed)
                if others:
                    self._ask_for_another(number, near=sorted(others)[number % len(others)])

    def _ask_if_lost(self, number: int) -> None:
        if self._state_of(number) == "RESCHEDULING":
            self._ask_for_another(number)

    def _ask_for_another(self, number: int, *, near: str | None = None) -> None:
        self.give_back(number)
        self._workers[number] = _one(self._bundle, near=near)

    def _state_of(self, number: int) -> str | None:
        group = self._workers.get(number)
        return None if group is None else _state_of(group)

    def node_of(self, number: int) -> str | None:
        """The id of the node where the place of this worker is; None while it has none."""
        group = self._workers.get(number)
        return None if group is None else _node_of(group)

    def _of_worker(self, number: int) -> PlacementGroupSchedulingStrategy:
        is_draining = self.node_of(number) in state.get_draining_nodes()
        if number not in self._workers or is_draining:  # Nobody starts there any more.
            self._ask_for_another(number)
        self._ask_if_lost(number)
        return _within(self._workers[number])

    def close(self) -> None:
        """Give back all places. Those that wait for one leave first: one that was just about to get
        what another leaves would never give it back (Ray's issue 64693).
        """
        groups = [*self._workers.values(), *self._servers.values()]
        for group in sorted(groups, key=lambda group: _state_of(group) == "CREATED"):
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
        if not _is_placed(group, deadline=time.monotonic() + wait_s):
            free = ray.available_resources()
            raise NotEnoughResources(
                f"no room for {len(workers)} workers and {len(servers)} servers "
                f"within {wait_s:g} s (cluster.wait_s); free now: {free.get('CPU', 0):g} CPU and "
                f"{free.get('GPU', 0):g} GPU; end what else runs, lower num_workers, or add nodes"
            )
        found: dict[int, str] = placement_group_table(group)["bundles_to_node_id"]
        places = [found[number] for number in range(len(bundles))]
    finally:
        remove_placement_group(group)
    _wait_until_free(places, bundles)
    return places


def _wait_until_free(places: Sequence[str], bundles: Sequence[Mapping[str, float]]) -> None:
    """Wait until these bundles, which have left these nodes, have room there: a group that Ray
    cannot place at once it tries again only after half a second, or one.
    """
    wanted: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for node, bundle in zip(places, bundles, strict=True):
        for name, amount in bundle.items():
            wanted[node][name] += amount
    deadline = time.monotonic() + GIVING_BACK_LIMIT_S
    while time.monotonic() < deadline:
        free = nodes.free()
        if all(nodes.covers(free.get(node, {}), sums) for node, sums in wanted.items()):
            return
        threading.Event().wait(GIVING_BACK_PAUSE_S)


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
        is_placed = _is_placed(group, deadline=deadline)
        if not is_placed or time.monotonic() > deadline or _node_of(group) == node:
            return group
        remove_placement_group(group)
        threading.Event().wait(PLACING_PAUSE_S)


def _is_placed(group: PlacementGroup, *, deadline: float) -> bool:
    """Whether it has its place by then, or within a second: Ray counts whole ones. In between, this
    process hears that it is to end.
    """
    while not group.wait(1):
        if time.monotonic() >= deadline:
            return False
    return True


def _state_of(group: PlacementGroup) -> str:
    found: str = placement_group_table(group)["state"]
    return found


def _node_of(group: PlacementGroup) -> str | None:
    """The id of the node of its one bundle; None while that has none."""
    found: dict[int, str] = placement_group_table(group)["bundles_to_node_id"]
    return found.get(0) or None


def _within(group: PlacementGroup) -> PlacementGroupSchedulingStrategy:
    return PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=0)
