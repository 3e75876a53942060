"""Writers: who of a group of ranks writes which share of a checkpoint, and whether all of it is
there.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence

from xdist.segments import Segment
from xdist.strategies import Share
from xdist.topologies import Fault, Task
from xdist.topologies.crew import Hand
from xdist.worker_messages import WorkerReport

logger = logging.getLogger(__name__)


def shares_of(seated: Sequence[Hand]) -> dict[int, Share]:
    """By the lives of those who write; who cannot leaves it to the others, if there are any."""
    writers = [hand for hand in seated if hand.can_save] or seated
    return {hand.life: (index, len(writers)) for index, hand in enumerate(writers)}


def is_complete(reports: Sequence[WorkerReport], segment: Segment, *, num_ranks: int) -> bool:
    """Whether all ranks have made the segment's steps, and written what they were to wait for."""
    return len(reports) == num_ranks and all(
        report.progress.step == segment.until_step
        and report.interrupted is None
        and (report.written is None or report.written.unsaved is None)
        for report in reports
    )


def unsaved(reports: Sequence[WorkerReport], seated: Sequence[Hand]) -> tuple[Fault, ...]:
    """Who could not write its share of a checkpoint that it waited for, where others could, leaves
    that to them from now on. Where nobody could, it is the storage's fault. All try again.
    """
    written = {report.worker: report.written for report in reports if report.written is not None}
    failed = {worker: each.unsaved for worker, each in written.items() if each.unsaved is not None}
    if not failed:
        return ()
    if not any(each.parts for each in written.values()):
        return (refused_by_all(seated, next(iter(failed.values()))),)
    for hand in seated:
        if hand.number in failed:
            leave_to_others(hand, failed[hand.number])
    return ()


def leave_to_others(hand: Hand, why: str) -> None:
    """This worker writes nothing from now on."""
    hand.can_save = False
    logger.warning("worker %d leaves saving to the others: %s", hand.number, why)


def refused_by_all(hands: Iterable[Hand], why: str) -> Fault:
    """Nobody could write: it is the storage's fault, and none of theirs."""
    for hand in hands:
        hand.can_save = True
    return Fault(Task("storage", "train", 0), why, "unsaved")
