"""What training processes log, one line a finished step, and what the lines of a run tell.

The lines of all processes go to one file. This module imports nothing but the standard library:
the time that a process takes to its first step is measured.
"""

from __future__ import annotations

import os
import signal
import statistics
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal, Self

Event = Literal["step", "kill"]
EVENTS: Mapping[str, Event] = {"step": "step", "kill": "kill"}


@dataclass(frozen=True)
class Line:
    """One event in one process."""

    time: float
    """Seconds, of this machine's clock."""
    system: str
    rank: int
    process: int
    step: int
    """The update that is finished, from 1, or that the kill comes before."""
    event: Event

    def __str__(self) -> str:
        words = (f"{self.time:.6f}", self.system, self.rank, self.process, self.step, self.event)
        return " ".join(map(str, words))

    @classmethod
    def parse(cls, text: str) -> Self:
        """The line that `str` wrote."""
        seconds, system, rank, process, step, event = text.split()
        return cls(float(seconds), system, int(rank), int(process), int(step), EVENTS[event])


@dataclass(frozen=True)
class StepLog:
    """Writes the lines of one process, and kills it where that is planned."""

    path: str
    system: str
    rank: int
    kill_rank: int
    kill_step: int | None
    """The update that the process of `kill_rank` does not live to see, once in a run."""

    def finished(self, step: int) -> None:
        self._write(step, "step")

    def kill_before(self, step: int) -> None:
        """End this process by SIGKILL, if that is planned for it and has not happened yet."""
        marker = Path(f"{self.path}.killed")
        if step == self.kill_step and self.rank == self.kill_rank and not marker.exists():
            marker.touch()
            self._write(step, "kill")
            os.kill(os.getpid(), signal.SIGKILL)

    def _write(self, step: int, event: Event) -> None:
        line = Line(time.time(), self.system, self.rank, os.getpid(), step, event)
        with Path(self.path).open("a") as file:
            file.write(f"{line}\n")


class Timeline:
    """The finished steps of one run of `world_size` processes, before and after its one kill.

    A step is finished when the last process of its group says so. What a run did not come to is
    None.
    """

    def __init__(self, lines: Iterable[Line], *, launched: float, world_size: int) -> None:
        """`launched`: when the command was given, by the clock of the lines.

        `ValueError` for lines of several kills.
        """
        lines = sorted(lines, key=lambda line: line.time)
        kills = [line for line in lines if line.event == "kill"]
        if len(kills) > 1:
            raise ValueError(f"{len(kills)} processes were killed; allowed: one")
        steps = [line for line in lines if line.event == "step"]
        self._launched = launched
        self._kill = kills[0] if kills else None
        before = _before(steps, self._kill)
        after = [line for line in steps if line not in before]
        self._finished_before = _finished(before)
        self._finished_after = _finished(after)
        self._full_size_step = _full_size_step(after, world_size)

    @classmethod
    def read(cls, path: Path, *, launched: float, world_size: int) -> Self:
        lines = map(Line.parse, path.read_text().splitlines())
        return cls(lines, launched=launched, world_size=world_size)

    @property
    def first_step_s(self) -> float | None:
        """Seconds from the command to the first finished step."""
        times = self._finished_before.values()
        return min(times) - self._launched if times else None

    def step_seconds(self, *, skipped: int) -> list[float]:
        """From each step's end to the next one's, before the kill, but for the first `skipped`."""
        return _gaps(self._finished_before.values())[skipped:]

    @property
    def recovery_s(self) -> float | None:
        """Seconds from the kill to the next finished step."""
        return self._since_kill(next(iter(self._finished_after), None))

    @property
    def steps_lost(self) -> int | None:
        """Steps that were finished before the kill and are done again after it."""
        if self._kill is None or not self._finished_after:
            return None
        return max(0, self._kill.step - min(self._finished_after))

    @property
    def full_size_s(self) -> float | None:
        """Seconds from the kill to the next step that all `world_size` processes finish."""
        return self._since_kill(self._full_size_step)

    @property
    def shrunken_step_s(self) -> float | None:
        """Median seconds of the steps that fewer processes finish."""
        last = self._full_size_step
        gaps = _gaps(t for step, t in self._finished_after.items() if last is None or step < last)
        return statistics.median(gaps) if gaps else None

    @property
    def grow_pause_s(self) -> float | None:
        """The longest time between two finished steps, from the first after the kill until the
        second of full size.
        """
        if self._full_size_step is None:
            return None
        last = self._full_size_step + 1
        return max(
            _gaps(t for step, t in self._finished_after.items() if step <= last), default=None
        )

    def _since_kill(self, step: int | None) -> float | None:
        if self._kill is None or step is None:
            return None
        return self._finished_after[step] - self._kill.time


def _before(steps: list[Line], kill: Line | None) -> set[Line]:
    """The steps that were finished before the kill, those that are told of a little later too."""
    if kill is None:
        return set(steps)
    early = {line for line in steps if line.time < kill.time}
    veterans = {line.process for line in early}
    late = (line for line in steps if line.process in veterans and line.step < kill.step)
    return early.union(late)


def _finished(steps: Iterable[Line]) -> dict[int, float]:
    """When each step was finished by the last of those that tell of it; in the order of steps."""
    finished: dict[int, float] = {}
    for line in steps:
        finished[line.step] = max(line.time, finished.get(line.step, 0.0))
    return dict(sorted(finished.items()))


def _full_size_step(steps: Iterable[Line], world_size: int) -> int | None:
    """The first step that so many processes tell of."""
    processes: dict[int, set[int]] = {}
    for line in steps:
        processes.setdefault(line.step, set()).add(line.process)
    return min((step for step, who in processes.items() if len(who) >= world_size), default=None)


def _gaps(times: Iterable[float]) -> list[float]:
    return [later - earlier for earlier, later in pairwise(times)]
