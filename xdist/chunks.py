"""A long vector in chunks, by several threads."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import torch

CHUNK = 1 << 19
"""Elements: enough that a call costs nothing beside them, and so many chunks that a thread which
has to wait for its core keeps the others waiting for one chunk at most."""


def run_in_chunks(
    run: Callable[[int, int], None], size: int, *, num_threads: int | None = None
) -> None:
    """Call `run(start, stop)` for chunks that cover range(size), in any order and at once; it has
    to let go of the GIL. num_threads: this one included; None: as many as torch has.
    """
    starts = iter(range(0, size, CHUNK))

    def work() -> None:
        for start in starts:  # The threads share it: whoever is free takes the next.
            run(start, min(start + CHUNK, size))

    num_chunks = -(-size // CHUNK)
    num_helpers = max(0, min(num_threads or torch.get_num_threads(), num_chunks) - 1)
    helpers = [_executor(num_helpers).submit(work) for _ in range(num_helpers)]
    work()
    for helper in helpers:
        if not helper.cancel():
            helper.result()


@cache
def _executor(num_threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(num_threads, thread_name_prefix="chunks")
