"""Ending: how a run ends before its time, with what it has trained saved first."""

from __future__ import annotations

import logging
import time
from typing import NoReturn

from xdist.interruption import Interruption

logger = logging.getLogger(__name__)


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

    def fail(self, error: Exception) -> None:
        """The run cannot go on: this is what it ends with, unless something was before it."""
        self._failure = self._failure or error

    @property
    def is_due(self) -> bool:
        return self._interruption.is_asked or self._failure is not None

    @property
    def cause(self) -> BaseException:
        """What the run ends with."""
        if self._failure is None or self._interruption.is_asked:
            return KeyboardInterrupt()
        return self._failure

    def begins(self) -> bool:
        """Whether it is for now to have the state saved: once, and with time to do so."""
        if self._ends_by is not None:
            return False
        self._ends_by = time.monotonic() + self._may_take_s
        if self._interruption.is_asked and self._may_take_s:
            said = "told to end, saves first, for at most %g s; told again, it ends at once"
            logger.warning(said, self._may_take_s)
        elif self._may_take_s:
            logger.warning("cannot go on, saves first, for at most %g s", self._may_take_s)
        return self._may_take_s > 0

    def check(self, *, saved: int, newest: int) -> None:
        """Raise the cause if it has come. saved: the step of the last checkpoint; newest: the one
        that training had come to.
        """
        if self.saves_at is not None and saved >= self.saves_at:
            logger.info("all is saved step=%d", saved)
            raise self.cause
        if self._ends_by is not None and time.monotonic() > self._ends_by:
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
        return None if self._ends_by is None else max(0.0, self._ends_by - time.monotonic())
