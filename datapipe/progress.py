"""What a command shows on stderr while it works: a bar, where that is a terminal, and its log."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

from datapipe.safe_text import printable


class LogToStderr(logging.Handler):
    """Writes to whatever is stderr at that time: above the bar, while there is one.

    Names from data sets are in it, so what moves a terminal's cursor is spelled out.
    """

    def emit(self, record: logging.LogRecord) -> None:
        lines = self.format(record).split("\n")
        sys.stderr.write("".join(f"{printable(line)}\n" for line in lines))


@contextmanager
def progress_bar(title: str, total: int, *, num_done: int = 0) -> Iterator[Callable[[int], None]]:
    """A function to be called with the number of steps that were just made, of `total`."""
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    bar = Progress(
        *columns,
        console=console,
        disable=not console.is_terminal,
        redirect_stdout=sys.stdout.isatty(),  # else what is piped elsewhere would end up here
    )
    with bar:
        task = bar.add_task(title, total=total, completed=num_done)
        yield lambda num_steps: bar.advance(task, num_steps)
