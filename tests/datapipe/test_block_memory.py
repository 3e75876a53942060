"""Which blocks are in memory: never beyond the bounds, never without those that are to stay."""

from __future__ import annotations

from concurrent.futures import Future

import pytest
from hypothesis import given
from hypothesis import strategies as st

from datapipe.block_memory import Block, BlockMemory


def memory_of(max_blocks: int | None, max_bytes: int) -> BlockMemory[str]:
    return BlockMemory(max_blocks=max_blocks, max_bytes=max_bytes)


def add(
    memory: BlockMemory[str], number: int, num_bytes: int, needed: dict[int, int] | None = None
) -> Block[str] | None:
    """A block that has been read at once."""
    block = memory.add(number, num_bytes=num_bytes, num_samples=1, needed=needed or {})
    if block is not None:
        block.samples.set_result(["sample"])
    return block


@given(
    max_blocks=st.none() | st.integers(1, 5),
    steps=st.lists(
        st.tuples(
            st.sampled_from(["add", "use", "keep", "drop", "resize"]),
            st.integers(0, 9),
            st.integers(0, 40),
        ),
        max_size=60,
    ),
)
def test_no_order_of_steps_exceeds_the_bounds_or_takes_what_is_kept(
    max_blocks: int | None, steps: list[tuple[str, int, int]]
) -> None:
    memory = memory_of(max_blocks, 100)
    blocks: dict[int, Block[str]] = {}
    kept: set[int] = set()
    for step, number, num_bytes in steps:
        if step == "add" and number not in memory:
            block = add(memory, number, num_bytes)
            if block is not None:
                blocks[number] = block
        elif step == "keep":
            kept = {number, num_bytes % 10}
            memory.keep(kept)
        elif number in memory and step == "use":
            assert memory.use(number) is blocks[number]
        elif number in memory and step == "drop":
            memory.drop(number)
            del blocks[number]
        elif number in memory and step == "resize":
            memory.resize(blocks[number], num_bytes)
        assert all(number in memory for number in kept & blocks.keys())
        blocks = {number: block for number, block in blocks.items() if number in memory}
        assert memory.num_bytes == sum(block.num_bytes for block in blocks.values()) <= 100
        assert max_blocks is None or len(blocks) <= max_blocks


def test_the_blocks_that_were_not_used_for_longest_go() -> None:
    memory = memory_of(None, 100)
    for number in range(4):
        add(memory, number, 25)
    memory.use(0)
    assert add(memory, 4, 50)
    assert [number in memory for number in range(5)] == [True, False, False, True, True]


def test_what_is_needed_soon_stays_and_so_may_leave_no_place() -> None:
    memory = memory_of(2, 100)
    add(memory, 0, 10)
    add(memory, 1, 10)
    assert add(memory, 2, 10, needed={0: 1, 1: 2}) is None
    assert add(memory, 2, 10, needed={0: 1, 1: 0})
    assert 0 in memory
    assert 1 not in memory


def test_nothing_is_dropped_for_a_block_that_would_not_fit_anyway() -> None:
    memory = memory_of(None, 100)
    add(memory, 0, 60)
    assert add(memory, 1, 101) is None
    assert 0 in memory


def test_a_block_counts_until_nothing_reads_it_any_more() -> None:
    memory = memory_of(None, 100)
    block = memory.add(0, num_bytes=60, num_samples=1, needed={})
    assert block is not None
    block.samples = Future()
    block.samples.set_running_or_notify_cancel()
    memory.drop(0)
    assert memory.num_bytes == 60
    assert add(memory, 1, 50) is None
    block.samples.set_result(None)
    assert add(memory, 1, 50) is not None


def test_a_block_that_is_larger_than_thought_may_have_no_place() -> None:
    memory = memory_of(None, 100)
    block = add(memory, 0, 10)
    add(memory, 1, 80)
    assert block is not None
    assert memory.resize(block, 20)
    assert not memory.resize(block, 21)
    assert memory.num_bytes == 100


@pytest.mark.parametrize(("kept", "free"), [((), True), ((0,), True), ((0, 1), False)])
def test_room_may_come_where_a_block_is_not_kept(kept: tuple[int, ...], free: bool) -> None:
    memory = memory_of(None, 100)
    memory.keep(kept)
    add(memory, 0, 10)
    add(memory, 1, 10)
    assert memory.may_get_free == free
