"""Restarts: when a lost worker is started again."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping

LONGEST_WAIT_S = 600.0
MOST_FAILURES = 3
"""In a row, of a worker that is still counted on."""

NodeOf = Callable[[int], str | None]
"""From a worker's number, the id of the node where its place is; None while it has none."""


class Restarts:
    """At once, if it had trained, or on another node. One that was lost before it could, as on a
    bad node, waits twice as long each time that it is to start there, so that it neither holds up
    the others nor uses up the run's faults.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._failures: dict[int, Counter[str]] = {}
        """Of the workers that have not trained since: how often, by node."""
        self._lost_at: dict[int, float] = {}

    def add(self, number: int, *, has_trained: bool, node: str | None) -> None:
        """The worker of this number is to start again. node: where it was, if that is known."""
        if not has_trained and node is not None:
            self._failures.setdefault(number, Counter())[node] += 1
        self._lost_at[number] = self._clock()

    def forget(self, number: int) -> None:
        """The worker of this number does well."""
        self._failures.pop(number, None)

    @property
    def hopeless(self) -> frozenset[int]:
        """Who was lost so often before it could train, since it last did, that nobody should count
        on it: whether it waits, or tries once more.
        """
        return frozenset(
            number
            for number, failures in self._failures.items()
            if failures.total() >= MOST_FAILURES
        )

    def clear(self) -> None:
        """All workers begin anew: nobody waits. What is known of nodes stays."""
        self._lost_at.clear()

    @property
    def waiting(self) -> Mapping[int, frozenset[str]]:
        """The workers whose time has not come, with the nodes on which they have failed."""
        return {number: frozenset(self._failures.get(number, ())) for number in self._lost_at}

    def due(self, node_of: NodeOf) -> list[int]:
        """Whose time has come; each is told once."""
        now = self._clock()
        due = [
            number
            for number, lost_at in self._lost_at.items()
            if now >= lost_at + self._wait_s(number, node_of)
        ]
        for number in due:
            del self._lost_at[number]
        return due

    def _wait_s(self, number: int, node_of: NodeOf) -> float:
        """For one who has failed, at least until it has a place."""
        if (failures := self._failures.get(number)) is None:
            return 0.0
        if (node := node_of(number)) is None:
            return LONGEST_WAIT_S
        return min(2.0 ** max(0, failures[node] - 1) - 1, LONGEST_WAIT_S)
