"""Ending: how a run ends before its time, with what it has trained saved first."""

from __future__ import annotations

import logging
import time
from typing import NoReturn

from xdist.errors import RunFailed
from xdist.interruption import Interruption
from xdist.topologies import nodes

logger = logging.getLogger(__name__)

GRACE_S = 5.0
"""For what was begun before the end, as a manifest that is being written."""
LEAVING = (
    "the node of the driver is being drained, and the run would end with it: it ends now, with "
    "what it has trained; the same command goes on elsewhere"
)


class Ending:
    """Of one run. It is due when a signal asks for it, or when the run cannot go on."""

    def __init__(self, interruption: Interruption, *, may_take_s: float) -> None:
        """may_take_s: for saving what was trained."""
        self.saves_at: int | None = None
        """The step of the last checkpoint, once that is known."""
        self._interruption = interruption
        self._may_take_s = may_take_s
        self._failure: Exception | None = None
        self._ends_by: float | None = None

    def fail(self, error: Exception, why: str | None = None) -> None:
        """The run cannot go on; it ends with this, unless it was to end before. why: in a line;
        None: the first one of the error.
        """
        logger.warning("cannot go on: %s", why or str(error).splitlines()[0])
        if not self.is_due:
            self._failure = error

    @property
    def is_due(self) -> bool:
        return self._interruption.is_asked or self._failure is not None

    @property
    def cause(self) -> BaseException:
        """What the run ends with."""
        return self._failure or KeyboardInterrupt()

    def raise_failure(self) -> None:
        """Raise what the run ends with, where it could not go on."""
        if self._failure is not None:
            raise self._failure

    @property
    def leaving(self) -> RunFailed | None:
        """Why the run cannot stay, where the node of the driver is about to go: with it, whatever
        the other nodes do.
        """
        return RunFailed(LEAVING) if nodes.here() in nodes.draining() else None

    def begin(self) -> bool:
        """Returns whether it is for now to have the state saved: once, and with time to do so."""
        if self._ends_by is not None:
            return False
        self._ends_by = time.monotonic() + self._may_take_s
        if self._may_take_s:
            said = "saves what is trained, for at most %g s, and ends; told to end (again), at once"
            logger.warning(said, self._may_take_s)
        return self._may_take_s > 0

    @property
    def is_late(self) -> bool:
        """Whether it has taken as long as it may."""
        return self._ends_by is not None and time.monotonic() > self._ends_by

    def check(self, *, saved: int, newest: int) -> None:
        """Raise the cause if the run's end has come. saved: the step of the last checkpoint;
        newest: the one that training had come to.
        """
        if self.saves_at is not None and saved >= self.saves_at:
            logger.info("all is saved step=%d", saved)
            raise self.cause
        if self.is_late or self._interruption.is_at_once:
            self.give_up(saved=saved, newest=newest)

    def give_up(self, *, saved: int, newest: int) -> NoReturn:
        """Raise the cause: what is not saved is lost."""
        if newest > saved:
            logger.warning(
                "ends before all is saved step=%d updates_lost=%d", saved, newest - saved
            )
        raise self.cause

    @property
    def left_s(self) -> float | None:
        """How long what was begun may still take; None: as long as it takes."""
        if self._interruption.is_at_once:
            return 0.0
        return None if self._ends_by is None else max(GRACE_S, self._ends_by - time.monotonic())
