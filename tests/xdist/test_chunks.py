"""Chunks cover a vector once, whoever takes them."""

from __future__ import annotations

import threading

import pytest

from xdist.chunks import CHUNK, run_in_chunks


@pytest.mark.parametrize("size", [0, 1, CHUNK, CHUNK + 1, 5 * CHUNK - 1])
@pytest.mark.parametrize("num_threads", [None, 1, 3])
def test_every_element_is_in_one_chunk(size: int, num_threads: int | None) -> None:
    chunks: list[tuple[int, int]] = []
    run_in_chunks(lambda *chunk: chunks.append(chunk), size, num_threads=num_threads)
    chunks.sort()
    assert [start for start, _ in chunks] == [0, *[stop for _, stop in chunks]][: len(chunks)]
    assert size == (chunks[-1][1] if chunks else 0)


def test_threads_work_at_once() -> None:
    both = threading.Barrier(2, timeout=20)

    def meet(_start: int, _stop: int) -> None:
        both.wait()

    run_in_chunks(meet, 2 * CHUNK, num_threads=2)


def test_an_error_of_another_thread_is_raised() -> None:
    others = threading.Event()

    def fail_elsewhere(_start: int, _stop: int) -> None:
        if threading.current_thread() is threading.main_thread():
            assert others.wait(20)
        else:
            others.set()
            raise ValueError("a chunk")

    with pytest.raises(ValueError, match="a chunk"):
        run_in_chunks(fail_elsewhere, 4 * CHUNK, num_threads=2)
