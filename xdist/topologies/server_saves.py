"""ServerSaves: the cuts that parameter servers come to, from when the lead tells of one until all
have written their parts of it.
"""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from typing import Any

import ray

from xdist.checkpoint import Cut, checkpoint_url
from xdist.server_messages import ServerSave
from xdist.topologies import Fault, Outcome, Pending, Saved, Task
from xdist.topologies.saving import LATE_S
from xdist.topologies.server_crew import ServerCrew, ServerHand

logger = logging.getLogger(__name__)


class ServerSaves:
    """They are saved one after the other, beside the updates; some are left out where the storage
    takes longer than the next ones take to come.
    """

    def __init__(self, servers: ServerCrew, run_dir: str) -> None:
        self._servers = servers
        self._run_dir = run_dir
        self.asked_step = servers.saved_step
        """Of the last cut that was dealt with."""
        self._written: defaultdict[int, set[int]] = defaultdict(set)
        """Step of a cut -> the servers whose part is there."""
        self._began: dict[int, float] = {}
        """Steps of this term's cuts that are not saved yet -> when that began."""

    @property
    def is_at_work(self) -> bool:
        """Whether one is not saved yet."""
        return bool(self._began)

    def begin_term(self) -> None:
        """Go on after the last cut that is saved: a lost server may have had a part of a later
        one.
        """
        self.asked_step = self._servers.saved_step
        self._began.clear()

    def next_cut(self) -> Pending:
        """Have the lead tell of the next one."""
        lead, term = self._servers.lead, self._servers.term
        cut: ray.ObjectRef[Any] = lead.actor.next_cut.remote(self.asked_step)
        return {cut: lead.task("cut", term=term)}

    def begin(self, cut: Cut) -> Pending:
        """The servers have come to this one, or will soon."""
        self.asked_step = cut.step
        pending: Pending = {}
        if self._is_late and not cut.is_final:
            said = "checkpoint left out, as an earlier one is being written yet step=%d"
            logger.warning(said, cut.step)
            for hand in self._servers.primaries:
                dropped: ray.ObjectRef[Any] = hand.actor.drop_cut.remote(
                    cut.step, self._servers.term
                )
                pending[dropped] = hand.task("tell")
            return pending | self.next_cut()
        self._began[cut.step] = time.monotonic()
        for hand in self._servers.primaries:
            pending |= self._save_at(hand, cut)
        return pending if cut.is_final else pending | self.next_cut()

    @property
    def _is_late(self) -> bool:
        now = time.monotonic()
        return any(now - began > LATE_S for began in self._began.values())

    def _save_at(self, hand: ServerHand, cut: Cut) -> Pending:
        url = checkpoint_url(self._run_dir, cut.step)
        return {hand.actor.save.remote(cut.step, url): hand.task("save", cut=cut)}

    def receive(self, hand: ServerHand, task: Task, save: ServerSave) -> Outcome:
        """What became of a server's parts. What could not be written it tries again."""
        cut = task.cut
        assert cut is not None
        if save.unsaved is not None:
            fault = Fault(task, save.unsaved, "unsaved")
            return Outcome(pending=self._save_at(hand, cut), faults=(fault,))
        began = self._began.get(cut.step)
        self._written[cut.step].add(hand.number)
        if len(self._written[cut.step]) == len(self._servers.primaries):
            self._servers.saved_step = max(self._servers.saved_step, cut.step)
            self._began.pop(cut.step, None)
        return Outcome(saved=(Saved(cut, save.parts, began, save.corrupt),))
