"""What a person sees of a running job: live lines on a terminal, plain ones in a log."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from datetime import timedelta
from types import TracebackType
from typing import Any, Self

from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
)
from rich.text import Text

from xdist.state import WeightsName

logger = logging.getLogger(__name__)

PLAIN_EVERY_S = 5.0


class _Live(Progress):
    """A bar, beneath what is known of the run, which takes as many lines as it needs."""

    facts = ""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield Text(self.facts)
        yield self.make_tasks_table(self.tasks)


class ProgressDisplay:
    """Shows `train` and `evaluation` records as they come."""

    def __init__(self, *, num_places: int, num_done: int, console: Console) -> None:
        self._num_places = num_places
        self._last_line = float("-inf")
        self._started = (time.monotonic(), num_done)
        self._scores: dict[str, str] = {}
        """By the kind of weights."""
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TextColumn("left {task.fields[left]}"),
        )
        is_plain = not console.is_terminal
        self._live = _Live(*columns, console=console, disable=is_plain, expand=True)
        self._task = self._live.add_task(
            "starting", total=num_places, completed=num_done, left=_as_time(None)
        )

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._live.stop()

    def train(self, record: dict[str, Any]) -> None:
        """Show a `train` record; in a log, one of them every few seconds."""
        text = self._live.facts = self._text(record)
        epoch = f"epoch {record['epoch']:.2f}"
        num_done, left_s = record["samples"], self._left_s(record["samples"])
        left = _as_time(left_s)
        self._live.update(self._task, completed=num_done, description=epoch, left=left)
        now = time.monotonic()
        if self._live.disable and now - self._last_line >= PLAIN_EVERY_S:
            self._last_line = now
            logger.info("%s eta=%s", text, "?" if left_s is None else f"{left_s:.0f}s")

    def score(self, weights: WeightsName, scores: dict[str, float]) -> None:
        """The newest score of averaged or raw weights, shown from now on."""
        ending = "" if weights == "average" else "_raw"
        self._scores[weights] = " ".join(
            f"{name}{ending}={value:.3f}"
            for name, value in scores.items()
            if "prevalence" not in name
        )

    def _text(self, record: dict[str, Any]) -> str:
        loss = float("nan") if record["loss"] is None else record["loss"]
        num_workers, rate = record["num_workers"], record["samples_per_s"]
        waited = record["data_wait_s"] / max(record["step_s"], 1e-9)
        parts = [
            f"epoch={record['epoch']:.2f} step={record['step']} samples={record['samples']}",
            f"loss={loss:.4f} learning_rate={record['learning_rate']:.3g}",
            f"samples_per_s={rate:.0f} workers={num_workers}",
            f"per_worker={rate / max(1, num_workers):.0f} data_wait={min(waited, 1):.0%}",
        ]
        if record["staleness_mean"] is not None:
            parts.append(f"staleness={record['staleness_mean']:.1f}")
        if record["recoveries"]:
            parts.append(f"recoveries={record['recoveries']}")
        return " ".join([*parts, *self._scores.values()])

    def _left_s(self, num_samples: int) -> float | None:
        """Until the end, at the rate since the start."""
        started, samples_then = self._started
        rate = (num_samples - samples_then) / max(time.monotonic() - started, 1e-9)
        return (self._num_places - num_samples) / rate if rate > 0 else None


def _as_time(seconds: float | None) -> str:
    return "-:--:--" if seconds is None else str(timedelta(seconds=round(seconds)))
