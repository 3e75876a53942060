"""Profiler: a trace of a few steps of a worker, and a table of where their time goes."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from xdist.config import PROFILED_STEPS
from xdist.step_phases import StepClock, StepPhase, StepTimes

NUM_WARM_UP_STEPS = 3


@dataclass(frozen=True)
class Profile:
    """What was seen of some steps."""

    times: StepTimes
    trace: bytes
    """Of torch's profiler, in Chrome's format, gzip: for ui.perfetto.dev or chrome://tracing."""


class Profiler:
    """An observer of steps: lets the first few pass, records those that follow, and then rests.

    The phases are ranges of the trace. Starting and ending take a moment, outside of every step.
    """

    def __init__(self, device: torch.device) -> None:
        activities = [ProfilerActivity.CPU]
        if device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        self._trace = profile(activities=activities)
        self._clock = StepClock(device)
        self._num_steps = 0
        self._range: record_function | None = None
        self._is_taken = False

    @property
    def _is_recording(self) -> bool:
        return NUM_WARM_UP_STEPS <= self._num_steps < PROFILED_STEPS

    def enter(self, phase: StepPhase) -> None:
        if not self._is_recording:
            return
        self._clock.enter(phase)
        self._end_range()
        self._range = record_function(phase)
        self._range.__enter__()  # type: ignore[no-untyped-call]

    def end_step(self) -> None:
        if self._is_recording:
            self._clock.end_step()
            self._end_range()
        self._num_steps += 1
        if self._num_steps == NUM_WARM_UP_STEPS:
            self._trace.start()
        elif self._num_steps == PROFILED_STEPS:
            self._trace.stop()

    def _end_range(self) -> None:
        if self._range is not None:
            self._range.__exit__(None, None, None)
        self._range = None

    def take(self) -> Profile | None:
        """What was recorded, once all of it is; None before, and after it was taken. Raises
        `OSError` where there is no room for it on the way.
        """
        if self._is_taken or self._num_steps < PROFILED_STEPS:
            return None
        self._is_taken = True
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory) / "trace.json.gz"
            self._trace.export_chrome_trace(str(path))
            return Profile(self._clock.times(), path.read_bytes())
