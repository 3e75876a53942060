"""Where the time of a step goes: its phases, and who wants to know.

A step tells as it enters a phase; until it enters the next one, its time counts there. By default
nobody listens, and nothing is measured.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal, Protocol

import torch

StepPhase = Literal[
    "data", "forward", "backward", "replay", "all_reduce", "push", "pull", "optimizer", "other"
]
PHASE_NAMES: Final[Mapping[StepPhase, str]] = {
    "data": "data wait",
    "forward": "forward",
    "backward": "backward",
    "replay": "forward and backward",
    "all_reduce": "all-reduce, waited for",
    "push": "push",
    "pull": "pull",
    "optimizer": "optimizer",
    "other": "other",
}
"""All phases, in the order of a step, as people call them."""


class StepObserver(Protocol):
    """Is told how far a step has come."""

    def enter(self, phase: StepPhase) -> None:
        """What follows belongs to this phase."""

    def end_step(self) -> None:
        """The step is complete. One that was broken off before does not count."""


class Nobody:
    """An observer who does not care."""

    def enter(self, phase: StepPhase) -> None:
        """Nothing is measured."""

    def end_step(self) -> None:
        """Nothing is counted."""


@dataclass(frozen=True)
class StepTimes:
    """Seconds that so many steps spent in each phase."""

    num_steps: int
    seconds: Mapping[StepPhase, float]

    def milliseconds(self) -> dict[StepPhase, float]:
        """Of a step, in each phase that it has, in the order of `PHASE_NAMES`."""
        return {
            phase: 1000 * self.seconds[phase] / self.num_steps
            for phase in PHASE_NAMES
            if phase in self.seconds
        }

    def table(self) -> str:
        """A line for each phase: milliseconds a step, and share of the step."""
        rows = self.milliseconds()
        whole = sum(rows.values())
        lines = [f"{f'mean of {self.num_steps} steps':<24}{'ms':>10}{'%':>8}"]
        for phase, value in rows.items():
            share = 100 * value / whole if whole else 0.0
            lines.append(f"{PHASE_NAMES[phase]:<24}{value:>10.2f}{share:>8.1f}")
        lines.append(f"{'step':<24}{whole:>10.2f}{100:>8.1f}")
        return "\n".join(lines)


class StepClock:
    """An observer who measures. On a GPU it waits at the end of every phase for the work that was
    queued in it, so a step is slower while it is measured. What other streams do meanwhile, as an
    all-reduce, is not waited for: it counts where the step itself has to wait.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._seconds: defaultdict[StepPhase, float] = defaultdict(float)
        self._num_steps = 0
        self._step: defaultdict[StepPhase, float] = defaultdict(float)
        self._phase: StepPhase | None = None
        self._since = 0.0

    def enter(self, phase: StepPhase) -> None:
        if phase == "data":
            self._forget_step()
        now = self._now()
        if self._phase is not None:
            self._step[self._phase] += now - self._since
        self._phase, self._since = phase, now

    def end_step(self) -> None:
        self.enter("other")
        for phase, seconds in self._step.items():
            self._seconds[phase] += seconds
        self._num_steps += 1
        self._forget_step()

    def times(self) -> StepTimes:
        """Of all complete steps so far."""
        return StepTimes(self._num_steps, dict(self._seconds))

    def _forget_step(self) -> None:
        self._step.clear()
        self._phase = None

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()
        return time.perf_counter()
