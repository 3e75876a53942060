"""Draining: who leaves a node that is about to go, and when somebody has to come first."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from xdist.topologies.crew import Hand


def leaving(
    seated: Sequence[Hand], draining: Collection[str], *, num_joining: int, fewest: int
) -> list[Hand]:
    """Those of a group whose nodes are about to go, and who can leave: somebody stays who has the
    newest state, and with those who join at the same time there are `fewest` workers.
    """
    found = [hand for hand in seated if hand.node_id in draining]
    newest = max((hand.step for hand in seated if hand.step is not None), default=None)
    holders = [hand for hand in seated if hand.step is not None and hand.step == newest]
    if all(hand in found for hand in holders):
        found = [hand for hand in found if hand not in holders[:1]]
    num_spare = len(seated) + num_joining - fewest
    return found[: max(0, num_spare)]


def num_to_come_first(
    crew: Iterable[Hand],
    seated: Sequence[Hand],
    leaving: Sequence[Hand],
    draining: Collection[str],
) -> int:
    """How many more workers are to start elsewhere, as so many of a group cannot leave before."""
    num_held = sum(hand.node_id in draining for hand in seated) - len(leaving)
    num_coming = sum(hand not in seated and hand.node_id not in draining for hand in crew)
    return max(0, num_held - num_coming)
