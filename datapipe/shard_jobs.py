"""One piece of work for each shard, in several processes.

Every process runs Python of its own, as walking headers and decoding with Pillow hold its lock.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from types import FrameType
from typing import TypeVar

Job = TypeVar("Job")
Result = TypeVar("Result")
INTERRUPTED = 130
"""The exit code of a process that Ctrl-C ended."""


def for_each_shard(
    work: Callable[[Job], Result], jobs: Sequence[Job], *, num_processes: int
) -> Iterator[tuple[int, Result]]:
    """The number and result of each job, as they come.

    work: a function of a module, jobs and results picklable, unless num_processes is 1: then they
    run here. The first error ends the others; `OSError` if a process was killed.
    """
    if min(num_processes, len(jobs)) <= 1:
        yield from ((number, work(job)) for number, job in enumerate(jobs))
        return
    others = set(multiprocessing.active_children())
    executor = ProcessPoolExecutor(
        min(num_processes, len(jobs)), multiprocessing.get_context("spawn"), _die_at_interrupt
    )
    try:
        yield from _in_flight(executor, work, jobs, limit=2 * num_processes)
    except BrokenProcessPool as error:
        raise OSError(
            "a process that reads shards was killed, perhaps for want of memory; try again with "
            "fewer of them (--num-processes)"
        ) from error
    except BaseException:
        for process in set(multiprocessing.active_children()) - others:
            process.terminate()
        raise
    finally:
        executor.shutdown(cancel_futures=True)


def _in_flight(
    executor: ProcessPoolExecutor,
    work: Callable[[Job], Result],
    jobs: Sequence[Job],
    *,
    limit: int,
) -> Iterator[tuple[int, Result]]:
    """At most `limit` jobs are handed out at a time: results must not pile up either."""
    upcoming = iter(enumerate(jobs))
    running: dict[Future[Result], int] = {}
    while True:
        while len(running) < limit and (following := next(upcoming, None)) is not None:
            number, job = following
            running[executor.submit(work, job)] = number
        if not running:
            return
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            yield running.pop(future), future.result()


def _die_at_interrupt() -> None:
    signal.signal(signal.SIGINT, _die)


def _die(_number: int, _frame: FrameType | None) -> None:
    os._exit(INTERRUPTED)  # without a traceback for each process
