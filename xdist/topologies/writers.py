"""Writers: who of a group of ranks writes which share of a checkpoint, and whether all of it is
there.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from xdist.segments import Segment
from xdist.strategies import Share
from xdist.topologies import Fault, Task
from xdist.topologies.crew import Hand
from xdist.worker import WorkerReport

logger = logging.getLogger(__name__)


def shares_of(seated: Sequence[Hand]) -> dict[int, Share]:
    """By the lives of those who write; who cannot leaves it to the others, if there are any."""
    writers = [hand for hand in seated if hand.can_save] or seated
    return {hand.life: (index, len(writers)) for index, hand in enumerate(writers)}


def is_complete(reports: Sequence[WorkerReport], segment: Segment, *, num_ranks: int) -> bool:
    """Whether all ranks have made the segment's steps, and saved what they were to."""
    return len(reports) == num_ranks and all(
        report.progress.step == segment.until_step
        and report.interrupted is None
        and report.unsaved is None
        for report in reports
    )


def unsaved(reports: Sequence[WorkerReport], seated: Sequence[Hand]) -> tuple[Fault, ...]:
    """Who could not write its share of a checkpoint, where others could, leaves that to them from
    now on. Where nobody could, it is the storage's fault. All try again.
    """
    failed = {report.worker: report.unsaved for report in reports if report.unsaved is not None}
    if not failed:
        return ()
    if not any(report.parts for report in reports):
        for hand in seated:
            hand.can_save = True
        return (Fault(Task("storage", "train", 0), next(iter(failed.values())), "unsaved"),)
    for hand in seated:
        if hand.number in failed:
            hand.can_save = False
            said = "worker %d leaves saving to the others: %s"
            logger.warning(said, hand.number, failed[hand.number])
    return ()
