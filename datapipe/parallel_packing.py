"""Packing shards in processes of their own, with no trace of them once their parent is gone.

Every process has one pipe to its parent. It learns from that, at the next image, that the parent
has stopped or was killed, removes what it has half written, and ends: two commands never write the
same shard at a time.
"""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess

from datapipe.errors import DataError, PackingError
from datapipe.shard_packing import ShardJob, ShardRecord, pack_shard
from datapipe.storage import is_private

OnImages = Callable[[int], None]
Message = int | ShardRecord | DataError | OSError
"""From a process: images done since the last message, a shard that is done, or why it cannot be."""


def pack_shards(
    jobs: Sequence[ShardJob], *, num_processes: int, on_images: OnImages
) -> Iterator[ShardRecord]:
    """Do all jobs and give their records as they come; `on_images` is called with 1 an image.

    Errors: those of `pack_shard`, the first that is met; `PackingError` if a process was killed.
    """
    num_processes = min(num_processes, len(jobs))
    if num_processes <= 1 or any(is_private(job.directory) for job in jobs):
        yield from (pack_shard(job, on_images) for job in jobs)
        return
    workers = [_start_worker() for _ in range(num_processes)]
    try:
        yield from _deal(iter(jobs), workers, on_images)
    finally:
        for worker in workers:
            worker.connection.close()
        for worker in workers:
            worker.process.join()


@dataclass(frozen=True, eq=False)
class _Worker:
    """A process, and this end of its pipe."""

    process: SpawnProcess
    connection: Connection


def _start_worker() -> _Worker:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_work, args=(theirs,), daemon=True)
    process.start()
    theirs.close()
    return _Worker(process, ours)


def _deal(
    jobs: Iterator[ShardJob], workers: Sequence[_Worker], on_images: OnImages
) -> Iterator[ShardRecord]:
    """A job to every worker, and the next one to whoever is done."""
    busy = {worker.connection: worker for worker in workers if _send_next(jobs, worker)}
    while busy:
        for connection in wait(list(busy)):
            assert isinstance(connection, Connection)
            worker = busy[connection]
            message = _receive(worker)
            if isinstance(message, int):
                on_images(message)
            elif isinstance(message, ShardRecord):
                if not _send_next(jobs, worker):
                    del busy[connection]
                yield message
            else:
                raise message


def _send_next(jobs: Iterator[ShardJob], worker: _Worker) -> bool:
    job = next(jobs, None)
    if job is not None:
        try:
            worker.connection.send(job)
        except ConnectionError as error:
            raise _was_killed(worker) from error
    return job is not None


def _receive(worker: _Worker) -> Message:
    try:
        message: Message = worker.connection.recv()
    except (EOFError, ConnectionError) as error:
        raise _was_killed(worker) from error
    return message


def _was_killed(worker: _Worker) -> PackingError:
    worker.process.join()
    return PackingError(
        f"a packing process ended with exit code {worker.process.exitcode}: if that is "
        f"{-signal.SIGKILL}, it was killed, most often as memory was short; the same command goes "
        "on, with fewer --num-processes if need be"
    )


class _ParentGone(Exception):
    """Nobody is at the other end of the pipe."""


def _work(connection: Connection) -> None:
    """Do one job after another, until the parent hangs up."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's, who then hangs up

    def send(message: Message) -> None:
        try:
            connection.send(message)
        except OSError as error:
            raise _ParentGone from error

    with suppress(EOFError, _ParentGone):
        while True:
            send(_outcome(connection.recv(), send))


def _outcome(job: ShardJob, on_images: OnImages) -> Message:
    try:
        return pack_shard(job, on_images)
    except DataError as error:
        return error
    except OSError as error:  # of a storage's own class, perhaps, that pickle cannot rebuild
        is_plain = type(error).__module__ == OSError.__module__
        return error if is_plain else OSError(str(error))
