"""Which pushes make an update, when, and with which numbers."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.local_servers import (
    CONFIG,
    Worker,
    check,
    gradients_of,
    lead_of,
    lease_all,
    servers_of,
    settled,
    with_servers,
)
from xdist import optim
from xdist.errors import LeaseLost


def test_a_push_is_offered_once(tmp_path: Path) -> None:
    async def scenario() -> None:
        servers = servers_of(tmp_path, num_servers=1)
        await servers.begin()
        worker = await Worker.registered(servers, 0)
        described = await worker.described()
        await servers.push(described, gradients_of(servers, 1)[0])
        sequencer = lead_of(servers).sequencer
        with pytest.raises(LeaseLost, match="offered once"):
            sequencer.offer(described)

    check(scenario)


def test_gradients_are_clipped_by_what_the_commit_says(tmp_path: Path) -> None:
    config = replace(CONFIG, optimizer=replace(CONFIG.optimizer, clip_norm=2.0))

    async def scenario() -> None:
        servers = servers_of(tmp_path / "a", num_servers=2, config=config)
        await servers.begin()
        [gradient] = gradients_of(servers, 1)
        norm = float(np.linalg.norm(gradient))
        commit = await (await Worker.registered(servers, 0)).push(gradient, gradient_norm=norm)
        assert commit.scale == 2.0 / norm
        plain = servers_of(tmp_path / "b", num_servers=2)
        await plain.begin()
        clipped = gradient * np.float32(2.0 / norm)
        await (await Worker.registered(plain, 0)).push(clipped)
        assert np.array_equal(await servers.pull(1), await plain.pull(1))

    check(scenario)


def test_the_rate_of_a_stale_push_is_divided_by_its_staleness(tmp_path: Path) -> None:
    async def scenario() -> None:
        config = with_servers(scale_by_staleness=True)
        servers = servers_of(tmp_path, num_servers=1, config=config)
        await servers.begin()
        rates = []
        for number in range(4):
            worker = await Worker.registered(servers, number)
            before = lead_of(servers).sequencer.ledger.num_done
            commit = await worker.push(gradients_of(servers, 1)[0])
            rates.append(commit.learning_rate / optim.learning_rate(CONFIG.optimizer, before))
        assert rates == pytest.approx([1, 1, 1 / 2, 1 / 3])

    check(scenario)


def test_a_worker_that_is_too_far_ahead_waits_for_the_slowest(tmp_path: Path) -> None:
    async def scenario() -> None:
        servers = servers_of(tmp_path, num_servers=2, config=with_servers(max_clock_lead=2))
        await servers.begin()
        fast, slow = [await Worker.registered(servers, number) for number in range(2)]
        gradient = gradients_of(servers, 1)[0]
        await fast.push(gradient.copy())
        ahead = servers.pushing(await fast.described(), gradient.copy())
        await servers.pull(2)  # It is committed; its worker may not go on yet.
        await settled()
        assert not ahead.done()
        await slow.push(gradient.copy())
        assert (await ahead)[0].version == 2

    check(scenario)


@pytest.mark.parametrize("leaves", ["is lost", "has no samples"])
def test_who_leaves_holds_nobody_up(tmp_path: Path, leaves: str) -> None:
    async def scenario() -> None:
        servers = servers_of(tmp_path, num_servers=1, config=with_servers(max_clock_lead=1))
        await servers.begin()
        fast, slow = [await Worker.registered(servers, number) for number in range(2)]
        gradient = gradients_of(servers, 1)[0]
        ahead = servers.pushing(await fast.described(), gradient.copy())
        await servers.pull(1)
        await settled()
        assert not ahead.done()
        if leaves == "is lost":
            await servers.lead.release(1)
        else:
            await lease_all(servers.lead, 0, fast.token)
            waiting = asyncio.ensure_future(servers.lead.await_lease(1, slow.token))
        await ahead
        if leaves == "has no samples":
            waiting.cancel()

    check(scenario)


def test_the_first_pushes_of_a_version_make_an_update_and_the_others_are_dealt_again(
    tmp_path: Path,
) -> None:
    async def scenario() -> None:
        servers = servers_of(tmp_path / "a", num_servers=2, config=with_servers(commit_first=2))
        await servers.begin()
        workers = [await Worker.registered(servers, number) for number in range(3)]
        first, second, third = gradients_of(servers, 3)
        described = [await worker.described() for worker in workers]
        pushes = [servers.pushing(described[0], first), servers.pushing(described[1], second)]
        commit = (await pushes[0])[0].commit
        assert commit is not None
        assert commit.pushes == (described[0].id, described[1].id)
        late = await servers.pushing(described[2], third)
        assert [(reply.commit, reply.version) for reply in late] == [(None, 1), (None, 1)]
        again = await workers[0].described(base_version=1)
        assert again.spans == described[2].spans
        sizes = [sum(span.num_samples for span in push.spans) for push in described[:2]]
        shares = [np.float32(size / sum(sizes)) for size in sizes]
        plain = servers_of(tmp_path / "b", num_servers=2)
        await plain.begin()
        mean = first * shares[0] + second * shares[1]
        await (await Worker.registered(plain, 0)).push(mean)
        assert np.allclose(await servers.pull(1), await plain.pull(1), rtol=1e-6)

    check(scenario)


def test_a_late_push_of_a_worker_that_is_alone_is_not_waited_with(tmp_path: Path) -> None:
    async def scenario() -> None:
        servers = servers_of(tmp_path, num_servers=1, config=with_servers(commit_first=2))
        await servers.begin()
        await servers.lead.expect(frozenset({0, 1}))
        here, lost = [await Worker.registered(servers, number) for number in range(2)]
        push = servers.pushing(await here.described(), gradients_of(servers, 1)[0])
        await settled()
        assert not push.done()
        await lost.described()
        await servers.lead.release(1)
        assert (await push)[0].version == 1

    check(scenario)


def test_an_update_of_several_pushes_waits_for_workers_that_are_on_their_way(
    tmp_path: Path,
) -> None:
    async def scenario() -> None:
        servers = servers_of(tmp_path, num_servers=1, config=with_servers(commit_first=2))
        await servers.begin()
        first = await Worker.registered(servers, 0)
        push = servers.pushing(await first.described(), gradients_of(servers, 1)[0])
        for expected in ({0, 1, 2}, {0, 2}):
            await settled()
            assert not push.done()  # Before anybody is told of, all that there may be are.
            await servers.lead.expect(frozenset(expected))
        await servers.lead.expect(frozenset({0}))
        assert (await push)[0].version == 1

    check(scenario)


@pytest.mark.parametrize("options", [{"max_clock_lead": 1}, {"commit_first": 2}])
def test_who_reads_ahead_and_finds_no_samples_has_some_to_compute(
    tmp_path: Path, options: dict[str, int]
) -> None:
    async def scenario() -> None:
        servers = servers_of(tmp_path, num_servers=1, config=with_servers(**options))
        await servers.begin()
        await servers.lead.expect(frozenset({0, 1}))
        fast, slow = [await Worker.registered(servers, number) for number in range(2)]
        described = await slow.described()
        push = servers.pushing(await fast.described(), gradients_of(servers, 1)[0])
        await lease_all(servers.lead, 0, fast.token)
        reading = asyncio.ensure_future(servers.lead.await_lease(1, slow.token))
        await settled()
        assert not push.done()
        later = servers.pushing(described, gradients_of(servers, 1)[0])
        await push
        await settled()
        assert not reading.done()
        reading.cancel()
        later.cancel()

    check(scenario)


def test_a_reader_of_a_replaced_worker_does_not_wait(tmp_path: Path) -> None:
    async def scenario() -> None:
        servers = servers_of(tmp_path, num_servers=1, config=with_servers(max_clock_lead=1))
        await servers.begin()
        old = await Worker.registered(servers, 0)
        await Worker.registered(servers, 0)
        fast = await Worker.registered(servers, 1)
        with pytest.raises(LeaseLost, match="replaced"):
            await servers.lead.await_lease(0, old.token)
        push = servers.pushing(await fast.described(), gradients_of(servers, 1)[0])
        await servers.pull(1)
        await settled()
        assert not push.done()  # It waits for the new one.
        push.cancel()

    check(scenario)


def test_who_is_lost_while_it_waits_for_its_turn_does_not_begin(tmp_path: Path) -> None:
    async def scenario() -> None:
        config = with_servers(start_over_steps=4, max_clock_lead=1)
        servers = servers_of(tmp_path, num_servers=1, config=config)
        await servers.begin()
        first = await Worker.registered(servers, 0)
        later = asyncio.ensure_future(servers.lead.register(1))
        await settled()
        await servers.lead.release(1)
        with pytest.raises(LeaseLost, match="replaced"):
            await later
        for _ in range(2):  # Nobody is behind it.
            await first.push(gradients_of(servers, 1)[0])
        assert lead_of(servers).sequencer.workers == {0}

    check(scenario)


def test_workers_begin_one_after_the_other(tmp_path: Path) -> None:
    async def scenario() -> None:
        config = with_servers(start_over_steps=4)
        servers = servers_of(tmp_path, num_servers=1, config=config)
        await servers.begin()
        first = await Worker.registered(servers, 3)
        later = [asyncio.ensure_future(servers.lead.register(number)) for number in (2, 0)]
        for num_begun in range(3):
            await settled()
            assert sum(registered.done() for registered in later) == num_begun
            await first.push(gradients_of(servers, 1)[0])

    check(scenario)


def test_the_next_worker_begins_where_the_first_is_lost(tmp_path: Path) -> None:
    async def scenario() -> None:
        config = with_servers(start_over_steps=1000)
        servers = servers_of(tmp_path, num_servers=1, config=config)
        await servers.begin()
        await Worker.registered(servers, 0)
        later = asyncio.ensure_future(servers.lead.register(1))
        await settled()
        assert not later.done()
        await servers.lead.release(0)
        assert (await later)[1] == 0

    check(scenario)
