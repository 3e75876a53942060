"""Calls of one sender begin in the order in which they were made."""

from __future__ import annotations

import asyncio
import itertools

import pytest

from xdist.turns import Turn, Turns


@pytest.mark.parametrize("arrival", list(itertools.permutations(range(3))))
def test_calls_begin_in_order_however_they_arrive(arrival: tuple[int, ...]) -> None:
    async def scenario() -> list[tuple[str, int]]:
        turns, begun = Turns(), []

        async def call(turn: Turn) -> None:
            await turns.wait(turn)
            begun.append((turn.sender, turn.number))
            await asyncio.sleep(0)

        calls = [call(Turn(sender, number)) for number in arrival for sender in ("a", "b")]
        await asyncio.gather(*calls)
        return begun

    begun = asyncio.run(asyncio.wait_for(scenario(), 20))
    for sender in ("a", "b"):
        assert [number for who, number in begun if who == sender] == [0, 1, 2]


def test_a_sender_does_not_wait_for_another() -> None:
    async def scenario() -> None:
        turns = Turns()
        late = asyncio.ensure_future(turns.wait(Turn("a", 1)))
        await turns.wait(Turn("b", 0))
        assert not late.done()
        await turns.wait(Turn("a", 0))
        await late

    asyncio.run(asyncio.wait_for(scenario(), 20))
