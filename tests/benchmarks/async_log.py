"""What the workers of a small asynchronous run log, and strategies that log it, or wait.

The lines of all processes go to one file.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Self

from datapipe.batch import Batch
from datapipe.position import Span
from tests.strategies import Wrapped
from xdist.computation import BatchSums
from xdist.flat import FlatModel

SKIPPED_STEPS = 2
"""Of each worker, before its rate counts."""
GRADIENT = 2.0**-14
"""Exact in float32 and bfloat16, as are a few thousand times of it."""


@dataclass(frozen=True)
class Line:
    """One event in one process."""

    event: Literal["sent", "committed", "strike"]
    """sent: an update is asked for; committed: it is in the weights that the worker has; strike:
    somebody is about to be killed.
    """
    time: float
    """Seconds, of this machine's clock."""
    who: str
    """As `worker 1`; in a strike, who is killed."""
    process: int
    number: int = 0
    """Of the update, of those that this process asked for."""
    version: int = 0
    """committed: of the first weights that have it."""
    spans: tuple[Span, ...] = ()
    """The places that it covers."""

    def __str__(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def parse(cls, text: str) -> Self:
        """The line that `str` wrote."""
        values = json.loads(text)
        spans = tuple(Span(**span) for span in values.pop("spans"))
        return cls(**values, spans=spans)


@dataclass(frozen=True)
class PushLog:
    """Writes the lines of any process."""

    path: str

    def add(self, event: Literal["sent", "committed", "strike"], who: str, **facts: Any) -> None:
        line = Line(event, time.time(), who, os.getpid(), **facts)
        with Path(self.path).open("a") as file:
            file.write(f"{line}\n")

    def read(self) -> list[Line]:
        """All lines, in the order of time."""
        lines = map(Line.parse, Path(self.path).read_text().splitlines())
        return sorted(lines, key=lambda line: line.time)


class Logged(Wrapped):
    """A strategy whose updates are logged."""

    def __init__(self, strategy: Any, log: PushLog, *, number: int) -> None:
        super().__init__(strategy)
        self._log = log
        self._who = f"worker {number}"
        self._number = 0

    def update(self, batch: Batch, sums: BatchSums) -> None:
        self._number += 1
        facts = {"number": self._number, "spans": batch.spans}
        self._log.add("sent", self._who, **facts)
        self.strategy.update(batch, sums)
        version = self.strategy.progress.step
        self._log.add("committed", self._who, version=version, **facts)


class Waits(Wrapped):
    """A strategy whose worker seems to compute longer than it does: its process sleeps."""

    def __init__(self, strategy: Any, compute_s: float, *, over: Path | None = None) -> None:
        """over: a file that tells that it is to sleep no more."""
        super().__init__(strategy)
        self._compute_s = compute_s
        self._over = over
        self._never = threading.Event()

    def begin(self, batch: Batch, sums: BatchSums) -> None:
        if self._over is None or not self._over.exists():
            self._never.wait(self._compute_s)
        self.strategy.begin(batch, sums)


class SameGradient(Wrapped):
    """A strategy whose every gradient is `GRADIENT` everywhere: with plain SGD and a learning rate
    of 1, the weights tell how many updates are in them.
    """

    def __init__(self, strategy: Any, flat: FlatModel) -> None:
        super().__init__(strategy)
        self._flat = flat

    def gradient_ready(self, parameter: int) -> None:
        self._flat.layout.parameters[parameter].view(self._flat.gradients).fill_(GRADIENT)
        self.strategy.gradient_ready(parameter)


def updates_per_second(lines: Iterable[Line]) -> float:
    """Of all workers together, each over the time from the first of its updates that count to its
    last. Raises `ValueError` for a worker with fewer than two of these.
    """
    times: dict[str, list[float]] = defaultdict(list)
    for line in lines:
        if line.event == "committed":
            times[line.who].append(line.time)
    return sum(_rate(who, seen[SKIPPED_STEPS:]) for who, seen in times.items())


def _rate(who: str, times: Sequence[float]) -> float:
    if len(times) < 2:
        raise ValueError(f"{who} made {len(times) + SKIPPED_STEPS} updates; its rate takes more")
    return (len(times) - 1) / (times[-1] - times[0])
