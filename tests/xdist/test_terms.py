"""What is under way when a new term begins."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.local_servers import Worker, check, gradients_of, lead_of, servers_of, settled
from xdist.errors import PeerLost
from xdist.turns import Turn, Turns


def test_a_push_that_comes_as_a_term_begins_is_refused_by_all(tmp_path: Path) -> None:
    async def scenario() -> None:
        servers = servers_of(tmp_path, num_servers=2)
        await servers.begin()
        worker = await Worker.registered(servers, 0)
        described = await worker.described()
        await settled()
        old, [gradients] = lead_of(servers), gradients_of(servers, 1)
        await old.end_term()
        entered = [await each.server.enter(2, servers.primaries[0]) for each in servers.primaries]
        assert entered == [0, 0]
        await servers.stage(described.id, gradients)
        lead, other = (each.server for each in servers.primaries)
        answers = [lead.push(described.id, described), other.push(described.id)]
        waiting = [asyncio.ensure_future(answer) for answer in answers]
        await settled()
        assert old.sequencer.version == 0  # Who leads no more decides nothing.
        servers.term = 2
        await servers.begin()
        for push in waiting:
            with pytest.raises(PeerLost, match="have changed"):
                await push
        await (await Worker.registered(servers, 0)).push(gradients)

    check(scenario)


def test_calls_that_follow_a_lost_one_end_with_the_term(tmp_path: Path) -> None:
    async def scenario() -> None:
        servers = servers_of(tmp_path, num_servers=2)
        await servers.begin()
        for each in servers.primaries:
            late = each.server.in_turn(Turn("of an earlier term", 1), "staged", None)
            waiting = asyncio.ensure_future(late)
            await settled()
            assert not waiting.done()
            await servers.begin()
            with pytest.raises(PeerLost, match="have changed"):
                await waiting
        await (await Worker.registered(servers, 0)).push(gradients_of(servers, 1)[0])

    check(scenario)


def test_a_lead_that_comes_too_late_silences_nobody(tmp_path: Path) -> None:
    async def scenario() -> None:
        servers = servers_of(tmp_path, num_servers=2)
        for _ in range(2):
            await servers.begin()
        lead, other = servers.primaries
        with pytest.raises(PeerLost, match="term 2 has begun"):
            await other.server.in_turn(Turn("of an earlier term", 0), "enter", 1, lead)
        assert await lead.server.begin_term(1, servers.primaries, 0) == "interrupted"
        await (await Worker.registered(servers, 0)).push(gradients_of(servers, 1)[0])

    check(scenario)


def test_who_is_heard_goes_on_in_turn() -> None:
    async def scenario() -> None:
        turns = Turns()
        await turns.wait(Turn("a", 0))
        later = asyncio.ensure_future(turns.wait(Turn("a", 2)))
        turns.hear_only("a")
        await settled()
        assert not later.done()
        await turns.wait(Turn("a", 1))
        await later

    check(scenario)
