"""What bench-sync says of the runs that it timed."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from rich.table import Table

from tests.benchmarks import limits
from tests.benchmarks.sync_log import Timeline

WARM_UP_STEPS = 3
TORCHRUN, RAY_TRAIN, OURS, OURS_SPARE = "torchrun", "ray_train", "ours", "ours_spare"
RUNS = (TORCHRUN, RAY_TRAIN, OURS, OURS_SPARE)
"""What is run in every round; the last one has a spare worker."""

SMALLEST = {
    "steps_ratio_vs_torchrun": 0.98,
    "steps_ratio_vs_ray_train": 1.0,
    "first_step_ratio_vs_ray_train": 2.0,
    "recovery_ratio_vs_ray_train": 15.0,
    "recovery_ratio_vs_torchrun": 6.0,
    "spare_recovery_ratio_vs_ray_train": 5.0,
}
LARGEST = {"steps_lost": 0.0, "grow_pause_s": 3.0}
RECOVERY_S, RECOVERY_STEPS = 1.0, 1.5
"""The largest `recovery_s`: so many seconds and steps of the shrunken group."""


@dataclass(frozen=True)
class Measured:
    """One run; None is what it did not come to. All in seconds but `steps_lost`."""

    first_step_s: float | None
    step_s: float | None
    """Median."""
    quiet_step_s: float | None
    """The tenth percentile: of steps that other work on the machine disturbs least."""
    mean_step_s: float | None
    """With the checkpoints between the steps."""
    recovery_s: float | None
    steps_lost: float | None
    full_size_s: float | None
    shrunken_step_s: float | None
    grow_pause_s: float | None

    @classmethod
    def of(cls, timeline: Timeline) -> Measured:
        seconds = timeline.step_seconds(skipped=WARM_UP_STEPS)
        return cls(
            first_step_s=timeline.first_step_s,
            step_s=statistics.median(seconds) if seconds else None,
            quiet_step_s=sorted(seconds)[len(seconds) // 10] if seconds else None,
            mean_step_s=statistics.mean(seconds) if seconds else None,
            recovery_s=timeline.recovery_s,
            steps_lost=timeline.steps_lost,
            full_size_s=timeline.full_size_s,
            shrunken_step_s=timeline.shrunken_step_s,
            grow_pause_s=timeline.grow_pause_s,
        )

    def value(self, figure: str) -> float | None:
        value: float | None = vars(self)[figure]
        return value


class Rounds:
    """All runs, round by round; those that failed, and why."""

    def __init__(self) -> None:
        self.failures: dict[str, str] = {}
        self._rounds: list[dict[str, Measured]] = []

    def begin(self) -> None:
        """Another round."""
        self._rounds.append({})

    def add(self, run: str, measured: Measured) -> None:
        self._rounds[-1][run] = measured

    def fail(self, run: str, reason: str) -> None:
        """This run of the round says nothing."""
        self.failures[run] = reason

    def median(self, run: str, figure: str) -> float | None:
        return _median(self._values(run, figure))

    def largest(self, run: str, figure: str) -> float | None:
        return max(self._values(run, figure), default=None)

    def ratio(self, run: str, to: str, figure: str, *, of: str | None = None) -> float | None:
        """The median of the rounds' ratios: `figure` of `run` over `of`, or the same, of `to`."""
        pairs = (
            (each[run].value(figure), each[to].value(of or figure))
            for each in self._rounds
            if run in each and to in each
        )
        return _median(a / b for a, b in pairs if a is not None and b)

    def _values(self, run: str, figure: str) -> Iterator[float]:
        values = (each[run].value(figure) for each in self._rounds if run in each)
        return (value for value in values if value is not None)


def figures(rounds: Rounds) -> dict[str, float | None]:
    """What the last line says: medians of the rounds; the most of steps lost and pauses."""
    values = {
        "steps_ratio_vs_torchrun": rounds.ratio(TORCHRUN, OURS, "step_s"),
        "steps_ratio_vs_ray_train": rounds.ratio(RAY_TRAIN, OURS, "step_s"),
        "first_step_ratio_vs_ray_train": rounds.ratio(RAY_TRAIN, OURS, "first_step_s"),
        "recovery_s": rounds.median(OURS, "recovery_s"),
        "recovery_ratio_vs_ray_train": rounds.ratio(RAY_TRAIN, OURS, "recovery_s"),
        "recovery_ratio_vs_torchrun": rounds.ratio(TORCHRUN, OURS, "recovery_s"),
        "spare_recovery_ratio_vs_ray_train": rounds.ratio(RAY_TRAIN, OURS_SPARE, "full_size_s"),
        "steps_lost": _most(rounds, "steps_lost", OURS, OURS_SPARE),
        "grow_pause_s": _most(rounds, "grow_pause_s", OURS),
        "quiet_steps_ratio_vs_torchrun": rounds.ratio(TORCHRUN, OURS, "quiet_step_s"),
        "quiet_steps_ratio_vs_ray_train": rounds.ratio(RAY_TRAIN, OURS, "quiet_step_s"),
        "shrunken_step_s": rounds.median(OURS, "shrunken_step_s"),
        "full_size_s_ours": rounds.median(OURS, "full_size_s"),
        "spare_recovery_s": rounds.median(OURS_SPARE, "full_size_s"),
    }
    for run in (TORCHRUN, RAY_TRAIN, OURS):
        step_s, mean_step_s = rounds.median(run, "step_s"), rounds.median(run, "mean_step_s")
        values[f"steps_per_s_{run}"] = 1 / step_s if step_s else None
        values[f"steps_per_s_with_checkpoints_{run}"] = 1 / mean_step_s if mean_step_s else None
        values[f"first_step_s_{run}"] = rounds.median(run, "first_step_s")
        values[f"recovery_s_{run}"] = rounds.median(run, "recovery_s")
        values[f"steps_lost_{run}"] = rounds.largest(run, "steps_lost")
    return {name: value if value is None else round(value, 3) for name, value in values.items()}


def missed(values: Mapping[str, float | None]) -> list[str]:
    """The limits that are not kept, or whose figure is not there."""
    shrunken_step_s = values["shrunken_step_s"] or 0.0
    largest = {**LARGEST, "recovery_s": RECOVERY_S + RECOVERY_STEPS * shrunken_step_s}
    return limits.missed(values, smallest=SMALLEST, largest=largest)


def table_of(rounds: Rounds) -> Table:
    """For people."""
    table = Table(
        title="seconds: medians of the rounds",
        caption="first: command to first step; saved: mean step with the checkpoints between; "
        "next, full: kill to next step, to full size; small: step of the shrunken group; "
        "pause: longest while it grows; again: steps done again",
    )
    columns = {
        "first": "first_step_s",
        "step": "step_s",
        "saved": "mean_step_s",
        "next": "recovery_s",
        "full": "full_size_s",
        "small": "shrunken_step_s",
        "pause": "grow_pause_s",
        "again": "steps_lost",
    }
    table.add_column("run")
    for title in columns:
        table.add_column(title, justify="right")
    for run in RUNS:
        medians = [rounds.median(run, figure) for figure in columns.values()]
        table.add_row(run, *("-" if value is None else f"{value:.3g}" for value in medians))
    return table


def _most(rounds: Rounds, figure: str, *runs: str) -> float | None:
    values = [rounds.largest(run, figure) for run in runs]
    return max((value for value in values if value is not None), default=None)


def _median(values: Iterable[float]) -> float | None:
    values = list(values)
    return statistics.median(values) if values else None
