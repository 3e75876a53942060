"""What a person sees of a running job: a live line on a terminal, plain lines in a log."""

from __future__ import annotations

import logging
import time
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

logger = logging.getLogger(__name__)

PLAIN_EVERY_S = 5.0


class ProgressDisplay:
    """Shows `train` and `evaluation` records as they come."""

    def __init__(self, *, num_places: int, num_done: int, console: Console) -> None:
        self._num_places = num_places
        self._last_line = float("-inf")
        self._started = (time.monotonic(), num_done)
        self._score = ""
        columns = (
            TextColumn("{task.fields[text]}"),
            BarColumn(bar_width=24),
            TimeRemainingColumn(),
        )
        self._live = Progress(*columns, console=console, disable=not console.is_terminal)
        self._task = self._live.add_task(
            "train", total=num_places, completed=num_done, text="starting"
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
        text = self._text(record)
        self._live.update(self._task, completed=record["samples"], text=text)
        now = time.monotonic()
        if self._live.disable and now - self._last_line >= PLAIN_EVERY_S:
            self._last_line = now
            logger.info("%s eta=%s", text, self._eta(record["samples"]))

    def score(self, scores: dict[str, float]) -> None:
        """The newest score, shown from now on."""
        self._score = " ".join(
            f"{name}={value:.3f}" for name, value in scores.items() if "prevalence" not in name
        )

    def _text(self, record: dict[str, Any]) -> str:
        loss = float("nan") if record["loss"] is None else record["loss"]
        parts = [
            f"epoch={record['epoch']:.2f} step={record['step']} samples={record['samples']}",
            f"loss={loss:.4f} samples_per_s={record['samples_per_s']:.0f}",
        ]
        if record["staleness_mean"] is not None:
            parts.append(f"staleness={record['staleness_mean']:.1f}")
        return " ".join([*parts, self._score]).rstrip()

    def _eta(self, num_samples: int) -> str:
        started, samples_then = self._started
        rate = (num_samples - samples_then) / max(time.monotonic() - started, 1e-9)
        if rate <= 0:
            return "?"
        return f"{(self._num_places - num_samples) / rate:.0f}s"
