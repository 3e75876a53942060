"""A replica takes the place of a lost server, and nothing is lost."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from tests.local_servers import (
    LocalServers,
    Worker,
    check,
    gradients_of,
    lead_of,
    servers_of,
    settled,
)
from xdist.errors import LeaseLost, PeerLost
from xdist.sequencer import Decision


async def begun(directory: Path) -> LocalServers:
    """Two servers in their first term."""
    servers = servers_of(directory, num_servers=2)
    await servers.begin()
    return servers


async def replicated(directory: Path) -> LocalServers:
    """The same, each with a replica."""
    servers = await begun(directory)
    for number in range(2):
        await servers.replicate(number)
    return servers


@pytest.mark.parametrize("number", [0, 1])
def test_a_replica_takes_over_and_nothing_is_lost(tmp_path: Path, number: int) -> None:
    async def scenario() -> None:
        servers, plain = await replicated(tmp_path / "a"), await begun(tmp_path / "b")
        gradients = gradients_of(servers, 4)
        worker, alone = await Worker.registered(servers, 0), await Worker.registered(plain, 0)
        for gradient in gradients[:2]:
            await worker.push(gradient)
            await alone.push(gradient)
        await servers.fail_over(number)
        await servers.begin()
        assert np.array_equal(await servers.pull(2), await plain.pull(2))
        worker = await Worker.registered(servers, 0)
        assert (
            lead_of(servers).sequencer.ledger.num_done == lead_of(plain).sequencer.ledger.num_done
        )
        for gradient in gradients[2:]:
            commit = await worker.push(gradient, base_version=2)
            await alone.push(gradient)
        assert commit.version == 4
        assert np.array_equal(await servers.pull(4), await plain.pull(4))

    check(scenario)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("number", [0, 1, None])
def test_a_commit_that_a_primary_has_not_heard_of_is_made_up_for(
    tmp_path: Path, number: int | None, reverse: bool
) -> None:
    """Server 1 did not hear of the last commit before a primary was lost, or none. reverse: it
    hears of it after it was told to drop all that is not committed.
    """

    async def scenario() -> None:
        servers, plain = await replicated(tmp_path / "a"), await begun(tmp_path / "b")
        [gradient] = gradients_of(servers, 1)
        await (await Worker.registered(plain, 0)).push(gradient)
        worker = await Worker.registered(servers, 0)
        servers.primaries[1].held_back = []
        push = servers.pushing(await worker.described(), gradient)
        await servers.lead.pull(1)
        servers.primaries[1].forget_held_back()
        if number is not None:
            await servers.fail_over(number)
        servers.primaries[1].held_back = []
        await servers.begin()
        servers.primaries[1].deliver(reverse=reverse)
        assert np.array_equal(await servers.pull(1), await plain.pull(1))
        if number != 1:
            with pytest.raises(PeerLost):
                await push
        push.cancel()

    check(scenario)


def test_a_server_tells_in_which_term_it_did_not_reach_another(tmp_path: Path) -> None:
    async def scenario() -> None:
        servers = await begun(tmp_path)
        worker = await Worker.registered(servers, 0)
        await settled()
        watch = asyncio.ensure_future(servers.lead.watch())
        gradients = gradients_of(servers, 2)
        await worker.push(gradients[0])
        await settled()
        assert not watch.done()
        servers.primaries[1].is_dead = True
        push = servers.pushing(await worker.described(base_version=1), gradients[1])
        assert await watch == 1
        servers.primaries[1].is_dead = False
        push.cancel()

    check(scenario)


def test_of_two_terms_that_begin_at_once_the_later_one_counts(tmp_path: Path) -> None:
    async def scenario() -> None:
        servers = await begun(tmp_path)
        first, second = await asyncio.gather(servers.begin_term(), servers.begin_term())
        assert (first, second) == ("interrupted", 0)
        with pytest.raises(PeerLost, match="term 3 has begun"):
            await servers.primaries[1].enter(2, servers.primaries[0])

    check(scenario)


def test_a_decision_of_a_lost_primary_comes_too_late_for_its_successor(tmp_path: Path) -> None:
    async def scenario() -> None:
        servers = await replicated(tmp_path)
        held: list[Decision] = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(servers.replicas[0], "follow", partial(hold, held))
            worker = await Worker.registered(servers, 0)
            [gradient] = gradients_of(servers, 1)
            push = servers.pushing(await worker.described(), gradient)
            await settled()
        await servers.fail_over(0)
        await servers.begin()
        [late] = held
        await servers.lead.follow(late)
        worker = await Worker.registered(servers, 0)
        assert (await worker.push(gradient)).version == 1
        push.cancel()

    check(scenario)


def hold(held: list[Decision], decision: Decision) -> Awaitable[None]:
    """It is on its way, and does not arrive."""
    held.append(decision)
    return asyncio.get_running_loop().create_future()


def test_a_replica_that_did_not_hear_of_a_commit_is_ended(tmp_path: Path) -> None:
    async def scenario() -> None:
        servers = await replicated(tmp_path)
        replica = servers.replicas[1]
        worker = await Worker.registered(servers, 0)
        described = await worker.described()
        [gradient] = gradients_of(servers, 1)
        await servers.stage(described.id, gradient)
        await settled()
        replica.is_dead = True
        lead, other = (primary.server for primary in servers.primaries)
        await asyncio.gather(lead.push(described.id, described), other.push(described.id))
        await settled()
        assert replica.was_ended

    check(scenario)


def test_a_push_that_was_not_committed_is_dropped_with_its_term(tmp_path: Path) -> None:
    async def scenario() -> None:
        servers = await replicated(tmp_path)
        worker = await Worker.registered(servers, 0)
        described = await worker.described()
        start, stop = servers.ranges[0]
        [gradient] = gradients_of(servers, 1)
        await servers.lead.stage(described.id, 0, gradient[start:stop])
        push = asyncio.ensure_future(servers.lead.push(described.id, described))
        await settled()
        await servers.fail_over(1)
        await servers.begin()
        with pytest.raises(PeerLost):
            await push
        await settled()
        with pytest.raises(LeaseLost):
            await servers.primaries[1].server.stage(described.id, 0, gradient[stop:])
        again = await (await Worker.registered(servers, 0)).described()
        assert again.spans == described.spans
        assert (await servers.push(again, gradient)).version == 1

    check(scenario)


def test_commits_that_wait_while_a_replica_is_made_are_applied_by_both(tmp_path: Path) -> None:
    """Though a term begins, and one of their workers is replaced, before either applies them."""

    async def scenario() -> None:
        servers, plain = await begun(tmp_path / "a"), await begun(tmp_path / "b")
        gradients = gradients_of(servers, 2)
        primary, replica = servers.primaries[1].server, servers.new(1, is_replica=True)
        async with replica.server._range.at_rest:
            async with primary._range.at_rest:
                attaching = asyncio.ensure_future(primary.attach(replica))
                await settled()
                pushes = []
                for number, gradient in enumerate(gradients):
                    worker = await Worker.registered(servers, number)
                    pushes.append(servers.pushing(await worker.described(), gradient))
                    await servers.lead.pull(number + 1)
                beginning = asyncio.ensure_future(servers.begin())
                await settled()
            await beginning
            await Worker.registered(servers, 1)
            await settled()
        assert await attaching
        await asyncio.gather(*pushes, return_exceptions=True)
        servers.primaries[1].is_dead = True
        servers.primaries[1] = replica
        await servers.begin()
        for number, gradient in enumerate(gradients):
            await (await Worker.registered(plain, number)).push(gradient)
        assert np.array_equal(await servers.pull(2), await plain.pull(2))

    check(scenario)


def test_a_replica_that_is_lost_stops_nobody(tmp_path: Path) -> None:
    async def scenario() -> None:
        servers = await replicated(tmp_path)
        for replica in servers.replicas:
            replica.is_dead = True
        worker = await Worker.registered(servers, 0)
        for version, gradient in enumerate(gradients_of(servers, 2), start=1):
            assert (await worker.push(gradient)).version == version

    check(scenario)


def test_a_replica_that_missed_an_update_does_not_lead(tmp_path: Path) -> None:
    """It was not reached, and is ended; but its primary is lost before it is."""

    async def scenario() -> None:
        servers = await replicated(tmp_path)
        replica = servers.replicas[0]
        replica.is_dead = True
        worker = await Worker.registered(servers, 0)
        assert (await worker.push(gradients_of(servers, 1)[0])).version == 1
        replica.is_dead = False
        await servers.fail_over(0)
        assert await servers.begin_term() == "lacks_updates"

    check(scenario)


def test_a_replica_that_comes_late_has_what_is_under_way(tmp_path: Path) -> None:
    """Its primary has half of a push when it comes."""

    async def scenario() -> None:
        servers = servers_of(tmp_path / "a", num_servers=1)
        plain = servers_of(tmp_path / "b", num_servers=1)
        for each in (servers, plain):
            await each.begin()
        first, second = gradients_of(servers, 2)
        worker, alone = await Worker.registered(servers, 0), await Worker.registered(plain, 0)
        await worker.push(first)
        described = await worker.described()
        await servers.lead.stage(described.id, 50, second[50:])
        await servers.replicate(0)
        await servers.lead.stage(described.id, 0, second[:50])
        assert (await servers.lead.push(described.id, described)).version == 2
        for gradient in (first, second):
            await alone.push(gradient)
        await servers.fail_over(0)
        await servers.begin()
        assert np.array_equal(await servers.pull(2), await plain.pull(2))

    check(scenario)


def test_a_new_term_begins_with_a_cut_that_can_be_saved(tmp_path: Path) -> None:
    async def scenario() -> None:
        servers = await replicated(tmp_path)
        worker = await Worker.registered(servers, 0)
        await worker.push(gradients_of(servers, 1)[0])
        await servers.fail_over(0)
        await servers.begin()
        cut = await servers.lead.next_cut(0)
        assert cut is not None
        assert cut.step == 1
        saved = [await each.server.save(1, str(tmp_path / "cut")) for each in servers.primaries]
        assert [len(each.parts) for each in saved] == [2, 1]

    check(scenario)
