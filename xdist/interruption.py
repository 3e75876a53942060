"""Interruption: SIGINT and SIGTERM, as a run hears of them."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Interruption:
    """The first signal asks a run that trains to save and to end; at all other times, and when a
    second one comes, it unwinds the program as Ctrl-C does, so that the actors are ended.
    """

    def __init__(self) -> None:
        self.is_asked = False
        """Whether the run is to save and to end."""
        self.is_termination = False
        """Whether the last signal was SIGTERM: on its way through Ray an exception's own type is
        lost.
        """
        self.is_at_once = False
        """Whether it is to end without saving anything."""
        self._can_wait = False

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        self.is_termination = number == signal.SIGTERM
        if self._can_wait and not self.is_asked:
            self.is_asked = True
            return
        self.is_at_once = True
        raise KeyboardInterrupt

    @contextmanager
    def heard(self) -> Iterator[None]:
        """Inside the block signals are dealt with here, but for a Ctrl-C that nobody is to hear, as
        in the background of a script.
        """
        heard = [number for number in HEARD if signal.getsignal(number) != signal.SIG_IGN]
        before = {number: signal.signal(number, self._handle) for number in heard}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def waits(self, *, can_wait: bool = True) -> Iterator[None]:
        """Inside the block somebody looks at `is_asked` about every second; or nobody does."""
        before, self._can_wait = self._can_wait, can_wait
        try:
            yield
        finally:
            self._can_wait = before


HEARD = (signal.SIGINT, signal.SIGTERM)
