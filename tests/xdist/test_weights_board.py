"""Weights that a server publishes in memory: whole, new, and never waited for in vain."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Thread
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.children import Child, child
from tests.xdist.board_processes import (
    read_without_pause,
    readings,
    value_of,
    write,
    write_without_pause,
)
from xdist import weights_board
from xdist.errors import PeerLost
from xdist.weights_board import BoardReader, WeightsBoard

pytestmark = pytest.mark.skipif(
    not weights_board.is_available(),
    reason="native/board.c is not built; pip install . builds it where there is a compiler",
)
properties = settings(derandomize=True, deadline=None, max_examples=40)
LONG_S = 30.0
"""Nothing here takes as long as that: what fails before it has not waited for it."""


@contextmanager
def writer(**board_options: Any) -> Iterator[tuple[Child, BoardReader]]:
    """A server that publishes when it is told to, and a reader of its board."""
    with child(write, {"size": 1001, "dtype": torch.float32, **board_options}) as server:
        yield server, BoardReader(server.answer())


def read_whole(reader: BoardReader, *, min_version: int, timeout_s: float = LONG_S) -> int:
    """The version that is read; every element is of that version."""
    out = torch.full((1001,), torch.nan)
    version = reader.read(out, min_version=min_version, timeout_s=timeout_s)
    assert out.tolist() == [value_of(version)] * 1001
    return version


@properties
@given(
    st.integers(1, 3000),
    st.integers(0, 9),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.integers(1, 4),
)
def test_what_is_read_is_what_was_published(
    size: int, start: int, dtype: torch.dtype, num_buffers: int
) -> None:
    board = WeightsBoard("test", size=size, dtype=dtype, num_buffers=num_buffers)
    reader = BoardReader(board.address)
    generator = torch.Generator().manual_seed(size)
    whole = torch.full((start + size + 1,), 7.0)  # A range begins anywhere in a worker's weights.
    for version in (0, 1, 2, 5, 9):
        weights = torch.randn(size, generator=generator).to(dtype)
        board.next_buffer().copy_(weights)
        board.publish(version)
        out = whole[start : start + size]
        assert reader.read(out, min_version=0, timeout_s=LONG_S) == version
        assert torch.equal(out, weights.float())
    assert whole[:start].tolist() == [7.0] * start
    assert whole[-1] == 7.0


def test_every_bfloat16_is_read_as_the_same_number() -> None:
    bits = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16)
    board = WeightsBoard("test", size=1 << 16, dtype=torch.bfloat16)
    board.next_buffer().view(torch.int16).copy_(bits)
    board.publish(0)
    out = torch.empty(1 << 16)
    BoardReader(board.address).read(out, min_version=0, timeout_s=LONG_S)
    expected = bits.to(torch.int32) << 16  # The upper half, also of what is not a number.
    assert torch.equal(out.view(torch.int32), expected)


def test_a_reader_waits_for_its_version_while_other_threads_run() -> None:
    there = WeightsBoard("test", size=3, dtype=torch.float32)
    back = WeightsBoard("test", size=3, dtype=torch.float32)

    def answer() -> None:
        reader, out = BoardReader(there.address), torch.empty(3)
        for version in range(300):
            reader.read(out, min_version=version, timeout_s=LONG_S)
            back.next_buffer().copy_(out)
            back.publish(version)

    thread = Thread(target=answer)
    thread.start()
    reader, out = BoardReader(back.address), torch.empty(3)
    for version in range(300):
        there.next_buffer().fill_(value_of(version))
        there.publish(version)
        assert reader.read(out, min_version=version, timeout_s=LONG_S) == version
        assert out.tolist() == [value_of(version)] * 3
    thread.join()


@pytest.mark.parametrize("num_buffers", [2, 3])
def test_a_killed_server_leaves_its_newest_whole_version(num_buffers: int) -> None:
    with writer(num_buffers=num_buffers) as (server, reader):
        for version in range(5):
            server.ask(("publish", version))
        server.ask(("begin", 5))
        assert read_whole(reader, min_version=0) == 4
        server.kill()
        assert read_whole(reader, min_version=4) == 4
        with pytest.raises(PeerLost, match="ended before version 5"):
            read_whole(reader, min_version=5)


def test_with_one_buffer_a_server_that_is_killed_while_it_writes_leaves_nothing() -> None:
    with writer(num_buffers=1) as (server, reader):
        server.ask(("publish", 0))
        assert read_whole(reader, min_version=0) == 0
        server.ask(("begin", 1))
        server.kill()
        with pytest.raises(PeerLost, match="ended before version 0"):
            read_whole(reader, min_version=0)


def test_a_stopped_server_is_not_waited_for_longer_than_allowed() -> None:
    with writer() as (server, reader):
        with pytest.raises(PeerLost, match=r"had no version 0 in 0\.0 s"):
            read_whole(reader, min_version=0, timeout_s=0.0)
        server.ask(("publish", 0))
        server.ask(("begin", 1))
        server.stop()
        assert read_whole(reader, min_version=0) == 0
        with pytest.raises(PeerLost, match=r"had no version 1 in 0\.2 s"):
            read_whole(reader, min_version=1, timeout_s=0.2)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("num_buffers", "size"), [(1, 1 << 14), (2, 1 << 16), (3, 1 << 18)])
def test_no_reading_is_torn(num_buffers: int, size: int, dtype: torch.dtype) -> None:
    board_options = {"size": size, "dtype": dtype, "num_buffers": num_buffers}
    with child(write_without_pause, board_options) as server:
        address = server.answer()
        with child(read_without_pause, address, 1.0) as other:
            found = [readings(address, 1.0), other.answer()]
        num_versions = server.ask("stop")
    for one in found:
        assert one.num_torn == 0
        assert one.last_version < num_versions
        if num_buffers == 3:
            assert one.num_whole > 10
