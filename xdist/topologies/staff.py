"""Staff: the worker actors that a synchronous run should have, and who starts in whose place."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from ray.actor import ActorHandle

from xdist import fork_servers, sizing
from xdist.checkpoint import Checkpoint
from xdist.strategies import UpdateStrategy
from xdist.topologies import Fault, Pending, RunPlan, nodes
from xdist.topologies.batches import LaneBatches
from xdist.topologies.crew import Crew, Hand
from xdist.topologies.draining import num_to_come_first
from xdist.topologies.restarts import Restarts
from xdist.topologies.room import Room

logger = logging.getLogger(__name__)

MakeStrategy = Callable[..., UpdateStrategy]


class Staff:
    """As many workers and spares as the run may have, once it is open.

    One that is lost starts again, at once or later; one whose node is about to go starts anew
    elsewhere. Nobody starts for one who has a successor already.
    """

    def __init__(
        self, plan: RunPlan, *, make_strategy: MakeStrategy, warm_up_images: Sequence[int]
    ) -> None:
        """`make_strategy` and `warm_up_images`: of `AllReduceTopology` and of `Crew`."""
        self._plan = plan
        self._make_strategy = make_strategy
        self.crew = Crew(
            self._actor,
            patience_s=plan.config.cluster.collective_timeout_s,
            warm_up_images=warm_up_images,
            check_node=partial(
                nodes.require_run_directory, plan.run_dir, nodes.mark_of(plan.run_dir)
            ),
        )
        self._room: Room | None = None
        self.request = nodes.WorkerRequest(plan.config, self._num_wanted)
        self._restarts = Restarts()
        self.draining: frozenset[str] = frozenset()
        """The ids of the nodes that are about to go."""
        self.num_together = plan.num_workers
        """Workers that had a place when it was opened."""

    def open(self, start: Checkpoint, *, is_first: bool) -> Pending:
        """Start all of them, the workers with the checkpoint's state. is_first: the run begins, for
        which it may need more workers at once than to go on.
        """
        plan, cluster = self._plan, self._plan.config.cluster
        self._checkpoint_url = start.url
        self._restarts.clear()
        self.draining = frozenset()
        self._room = Room(
            plan.config,
            num_workers=plan.num_workers,
            fewest_workers=plan.fewest_to_begin if is_first else cluster.min_world_size,
        )
        self.num_together = self._room.num_together
        self.request.keep()
        num_at_once = plan.num_workers + cluster.num_spares
        if cluster.num_spares and not sizing.fits(plan.config, nodes.resources(), num_at_once):
            logger.warning(
                "no room yet for all spares num_spares=%d; they start when there is",
                cluster.num_spares,
            )
        pending: Pending = {}
        for number in range(self._num_wanted):
            starts_together = number < plan.num_workers
            step = start.manifest.cut.step if starts_together else None
            pending |= self.crew.start(number, step=step, ends_run=is_first and starts_together)
        return pending

    def _actor(self, number: int, has_state: bool) -> ActorHandle[Any]:
        assert self._room is not None
        plan = self._plan
        return self._room.worker(
            number,
            plan.config,
            num_classes=plan.num_classes,
            make_strategy=partial(
                self._make_strategy,
                plan.for_workers(),
                number=number,
                checkpoint_url=self._checkpoint_url if has_state else None,
            ),
            make_batches=partial(LaneBatches.of, plan.for_workers()),
        )

    @property
    def _num_wanted(self) -> int:
        return self._plan.most_workers + self._plan.config.cluster.num_spares

    @property
    def _taken(self) -> frozenset[int]:
        """The numbers of the workers that are there, and of those that are to start again."""
        return frozenset(self._restarts.waiting) | {hand.number for hand in self.crew}

    @property
    def _lacks_workers(self) -> bool:
        """Whether somebody is to start in the place of one who is gone."""
        return len(self._taken) < self._num_wanted

    def ready(self, *, with_state: bool) -> list[Hand]:
        """Those who are in no group, and could join one; with_state: who have one already. In the
        order of their numbers, first who have one.
        """
        found = [
            hand
            for hand in self.crew
            if hand.state == "ready"
            and hand.node_id not in self.draining
            and (hand.step is not None or not with_state)
        ]
        return sorted(found, key=lambda hand: (hand.step is None, hand.number))

    def num_placed(self, *, with_state: bool) -> int:
        """Workers that are there, or have a place to start at and are not hopeless; with_state: if
        they then have one from the checkpoint, or from others.
        """
        there = [hand for hand in self.crew if hand.state != "starting"]
        starting = [hand for hand in self.crew if hand.state == "starting"]
        num_there = sum(hand.step is not None or not with_state for hand in there)
        numbers = {hand.number for hand in starting if hand.step is not None or not with_state}
        numbers = numbers.union(self._restarts.waiting) - self._restarts.hopeless
        return num_there + sum(map(self._has_place, numbers))

    def lose(self, hand: Hand) -> None:
        """A worker is lost: end what is left of it; its replacement is one of those due."""
        self.crew.end(hand)
        if self._lacks_workers:
            node = hand.node_id or self._place_of(hand.number)
            self._restarts.add(hand.number, has_trained=hand.has_trained, node=node)
        else:
            self._give_back(hand.number)

    def does_well(self, hand: Hand) -> None:
        """A worker trains: should it be lost, it starts again at once."""
        hand.has_trained = True
        self._restarts.forget(hand.number)

    def start_due(self, *, step: int | None) -> Pending:
        """Start the replacements whose time has come. step: of `Crew.start`."""
        assert self._room is not None
        self._room.look_for_better(self._restarts.waiting)
        pending: Pending = {}
        for number in self._restarts.due(self._room.node_of):
            if self._lacks_workers:
                pending |= self.crew.start(number, step=step)
            else:  # While it waited, a successor came to stay.
                self._give_back(number)
        return pending

    def look_for_draining(self, *, step: int | None) -> Pending:
        """Ask which nodes are about to go; who is in no group yet, and would be there, starts anew
        elsewhere. step: of `Crew.start`.
        """
        self.draining = nodes.to_leave()
        fork_servers.leave(self.draining)
        pending: Pending = {}
        for hand in list(self.crew) if self.draining else []:
            is_ahead = hand.state in ("starting", "ready")
            if is_ahead and self._place_of(hand.number) in self.draining:
                pending |= self.move(hand, step=step)
        return pending

    def move(self, hand: Hand, *, step: int | None = None) -> Pending:
        """Have a worker that is not at work start anew on another node, if nobody has for it."""
        logger.info("worker %d leaves its node, which is being drained", hand.number)
        self.crew.end(hand)
        self._give_back(hand.number)
        return self.crew.start(hand.number, step=step) if self._lacks_workers else {}

    def start_without_state(self, hand: Hand) -> Pending:
        """Have a worker that starts begin anew, and get its state from others."""
        self.crew.end(hand)
        return self.crew.start(hand.number, step=None)

    def unheard(self) -> list[Fault]:
        """Workers that do not start, though they could."""
        return self.crew.unheard(self._has_place)

    def start_successors(self, *, seated: Sequence[Hand], leaving: Sequence[Hand]) -> Pending:
        """Start workers elsewhere for those of a group who cannot leave their nodes before."""
        pending: Pending = {}
        for _ in range(num_to_come_first(self.crew, seated, leaving, self.draining)):
            number = next(number for number in itertools.count() if number not in self._taken)
            logger.info("worker %d starts for one whose node is being drained", number)
            pending |= self.crew.start(number, step=None)
        return pending

    def _place_of(self, number: int) -> str | None:
        assert self._room is not None
        return self._room.node_of(number)

    def _has_place(self, number: int) -> bool:
        assert self._room is not None
        return self._room.has_place(number)

    def _give_back(self, number: int) -> None:
        assert self._room is not None
        self._room.give_back(number)

    def close(self) -> None:
        """End all of them."""
        self.crew.clear()
        if self._room is not None:
            self._room.close()
        self._room = None
