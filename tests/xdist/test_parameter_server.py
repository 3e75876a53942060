"""Servers together do what one optimizer does, in the order of commits: all of a push or none."""

from __future__ import annotations

import asyncio
import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from datapipe.errors import CorruptSample
from tests.local_servers import (
    CONFIG,
    NUM_SAMPLES,
    NUM_STATISTICS,
    LocalServers,
    Worker,
    check,
    gradients_of,
    lead_of,
    lease_all,
    push_of,
    servers_of,
    settled,
    with_servers,
)
from xdist import checkpoint, optim
from xdist.checkpoint import Cut, Manifest
from xdist.errors import LeaseLost
from xdist.sequencer import PushId, Vector
from xdist.update import Step, Update


@pytest.mark.parametrize("num_servers", [1, 2, 5])
def test_any_number_of_servers_equals_one_optimizer_to_the_bit(
    tmp_path: Path, num_servers: int
) -> None:
    async def scenario() -> None:
        servers = servers_of(tmp_path, num_servers=num_servers)
        layout = servers.start.manifest.layout
        weights = servers.start.read_range(0, layout.num_weights)["weights"].clone()
        average = weights.clone()
        mask = layout.l2_mask("kernels")
        optimizer = optim.make_optimizer(CONFIG.optimizer, size=layout.num_weights, l2_mask=mask)
        num_samples = 0
        await servers.begin()
        worker = await Worker.registered(servers, 0)
        for number, gradient in enumerate(gradients_of(servers, 4)):
            commit = await worker.push(gradient)
            rate = optim.learning_rate(CONFIG.optimizer, num_samples)
            decay = optim.average_decay(
                CONFIG.optimizer, num_samples=commit.num_samples - num_samples, num_updates=number
            )
            optimizer.step(Update(weights, [Step(torch.from_numpy(gradient.copy()), rate)]))
            optim.fold(average, weights, share=1 - decay)
            num_samples = commit.num_samples
            assert np.array_equal(await servers.pull(commit.version), weights.numpy())
        assert num_samples > 10  # The learning rate has decayed on the way.

    check(scenario)


async def saved_weights(servers: LocalServers, cut: Cut | None, run_dir: Path) -> Vector:
    """Those of a cut, saved by all servers."""
    assert cut is not None
    url = checkpoint.checkpoint_url(str(run_dir), cut.step)
    saved_parts = [(await each.server.save(cut.step, url)).parts for each in servers.primaries]
    parts = tuple(itertools.chain(*saved_parts))
    layout = servers.start.manifest.layout
    saved = checkpoint.publish(url, Manifest(cut, layout, parts, {}, {}, checkpoint.versions()))
    weights: Vector = saved.read_range(0, layout.num_weights)["weights"].numpy()
    return weights


@pytest.mark.parametrize("reverse", [False, True])
def test_commits_that_arrive_in_any_order_are_applied_by_version(
    tmp_path: Path, reverse: bool
) -> None:
    async def saved_and_final_weights(*, held_back: bool) -> Vector:
        run_dir = tmp_path / str(held_back)
        servers = servers_of(run_dir, num_servers=3, save_every=8)
        await servers.begin()
        pushes = []
        generator = np.random.default_rng(7)
        workers = [await Worker.registered(servers, number) for number in range(3)]
        await settled()
        for follower in servers.followers if held_back else ():
            follower.held_back = []
        for number, worker in enumerate(workers):
            gradient = generator.standard_normal(servers.ranges[-1][1], np.float32)
            pushes.append(servers.pushing(await worker.described(), gradient))
            await servers.lead.pull(number + 1)
        for follower in servers.followers if held_back else ():
            follower.deliver(reverse=reverse)
        await asyncio.gather(*pushes)
        saved = await saved_weights(servers, await servers.lead.next_cut(0), run_dir)
        return np.stack([saved, await servers.pull(3)])

    async def scenario() -> None:
        late = await saved_and_final_weights(held_back=True)
        assert np.array_equal(late, await saved_and_final_weights(held_back=False))

    check(scenario)


def test_a_push_whose_worker_dies_in_the_middle_is_dropped(tmp_path: Path) -> None:
    async def scenario() -> None:
        servers = servers_of(tmp_path / "a", num_servers=2)
        await servers.begin()
        first, second = gradients_of(servers, 2)
        lost = await Worker.registered(servers, 0)
        described = await lost.described()
        start, stop = servers.ranges[0]
        await servers.lead.stage(described.id, 0, first[start:stop])
        push = asyncio.ensure_future(servers.lead.push(described.id, described))  # Here it dies.
        await settled()
        await servers.lead.release(0)
        worker = await Worker.registered(servers, 0)
        assert (await worker.push(second)).version == 1
        undisturbed = servers_of(tmp_path / "b", num_servers=2)
        await undisturbed.begin()
        await (await Worker.registered(undisturbed, 0)).push(second)
        assert np.array_equal(await servers.pull(1), await undisturbed.pull(1))
        with pytest.raises(LeaseLost):
            await push

    check(scenario)


@pytest.mark.parametrize("has_replica", [False, True])
def test_what_is_decided_when_its_worker_is_lost_is_applied_first(
    tmp_path: Path, has_replica: bool
) -> None:
    async def scenario() -> None:
        servers = servers_of(tmp_path / "a", num_servers=2)
        await servers.begin()
        if has_replica:
            await servers.replicate(0)
        worker = await Worker.registered(servers, 0)
        await settled()
        [gradient] = gradients_of(servers, 1)
        push = servers.pushing(await worker.described(), gradient)
        while lead_of(servers).sequencer.version == 0:
            await asyncio.sleep(0)
        await servers.lead.release(0)
        undisturbed = servers_of(tmp_path / "b", num_servers=2)
        await undisturbed.begin()
        await (await Worker.registered(undisturbed, 0)).push(gradient)
        assert np.array_equal(await servers.pull(1), await undisturbed.pull(1))
        push.cancel()

    check(scenario)


def test_a_piece_may_come_in_parts(tmp_path: Path) -> None:
    async def scenario() -> None:
        servers = servers_of(tmp_path / "a", num_servers=1)
        await servers.begin()
        [gradient] = gradients_of(servers, 1)
        described = await (await Worker.registered(servers, 0)).described()
        push = asyncio.ensure_future(servers.lead.push(described.id, described))
        await servers.lead.stage(described.id, 50, gradient[50:])
        await settled()
        assert not push.done()
        await servers.lead.stage(described.id, 0, gradient[:50])
        whole = servers_of(tmp_path / "b", num_servers=1)
        await whole.begin()
        await (await Worker.registered(whole, 0)).push(gradient)
        weights = (await push).weights
        assert weights is not None
        assert np.array_equal(weights, await whole.pull(1))

    check(scenario)


def test_pushes_of_a_worker_are_committed_in_its_order(tmp_path: Path) -> None:
    """The first is staged on all servers after the second is."""

    async def scenario() -> None:
        servers = servers_of(tmp_path, num_servers=2)
        await servers.begin()
        worker = await Worker.registered(servers, 0)
        first, second = await worker.described(), await worker.described()
        gradients = gradients_of(servers, 2)
        start, stop = servers.ranges[0]
        await servers.lead.stage(first.id, 0, gradients[0][start:stop])
        leading = asyncio.ensure_future(servers.lead.push(first.id, first))
        pushed = servers.pushing(second, gradients[1])
        await settled()
        assert not pushed.done()
        other = servers.followers[0].server
        await other.stage(first.id, 0, gradients[0][stop:])
        following = asyncio.ensure_future(other.push(first.id))
        replies = [await leading, await following, *(await pushed)]
        assert [reply.version for reply in replies] == [1, 1, 2, 2]

    check(scenario)


def test_a_replaced_worker_is_refused_everywhere(tmp_path: Path) -> None:
    async def scenario() -> None:
        servers = servers_of(tmp_path, num_servers=2)
        await servers.begin()
        [gradient] = gradients_of(servers, 1)
        old = await Worker.registered(servers, 0)
        described = await old.described()
        before = await servers.pull(0)
        await Worker.registered(servers, 0)
        await settled()
        for primary in servers.primaries:
            with pytest.raises(LeaseLost):
                await primary.server.stage(described.id, 0, gradient)
        with pytest.raises(LeaseLost):
            await servers.lead.push(described.id, described)
        with pytest.raises(LeaseLost):
            await servers.lead.lease(0, old.token)
        assert np.array_equal(await servers.pull(0), before)

    check(scenario)


def test_staleness_counts_the_commits_between_pull_and_push(tmp_path: Path) -> None:
    async def scenario() -> None:
        servers = servers_of(tmp_path, num_servers=1)
        await servers.begin()
        workers = [await Worker.registered(servers, number) for number in range(3)]
        [gradient] = gradients_of(servers, 1)
        commits = [await worker.push(gradient.copy()) for worker in workers]
        assert [commit.staleness for commit in commits] == [0, 1, 2]

    check(scenario)


def test_a_pull_waits_for_its_version(tmp_path: Path) -> None:
    async def scenario() -> None:
        servers = servers_of(tmp_path, num_servers=2)
        await servers.begin()
        [gradient] = gradients_of(servers, 1)
        servers.primaries[1].held_back = []
        worker = await Worker.registered(servers, 0)
        push = servers.pushing(await worker.described(), gradient)
        await servers.lead.pull(1)
        pull = asyncio.ensure_future(servers.primaries[1].server.pull(1))
        await settled()
        assert not pull.done()
        servers.primaries[1].deliver()
        assert (await pull).version == 1
        await push

    check(scenario)


def test_a_cut_holds_weights_and_ledger_of_one_version(tmp_path: Path) -> None:
    async def scenario() -> None:
        servers = servers_of(tmp_path, num_servers=2, save_every=8)
        await servers.begin()
        next_cut = asyncio.ensure_future(servers.lead.next_cut(0))
        worker = await Worker.registered(servers, 0)
        at_version: dict[int, Vector] = {}
        for sequence, gradient in enumerate(gradients_of(servers, 3), start=1):
            await worker.push(gradient)
            at_version[sequence] = await servers.pull(sequence)
        cut = await next_cut
        assert cut is not None
        assert np.array_equal(await saved_weights(servers, cut, tmp_path), at_version[cut.step])
        assert cut.position.num_seen(NUM_SAMPLES) == cut.num_samples >= 8
        assert cut.step < 3  # Training had gone on by the time it was written.

    check(scenario)


def test_a_successor_does_not_undo_its_predecessors_last_commit(tmp_path: Path) -> None:
    async def scenario() -> None:
        servers = servers_of(tmp_path, num_servers=2)
        await servers.begin()
        first, second = gradients_of(servers, 2)
        servers.primaries[1].held_back = []
        lost = await Worker.registered(servers, 0)
        push = servers.pushing(await lost.described(), first)
        await servers.lead.pull(1)  # It dies when server 0 has its push; the other knows nothing.
        worker = await Worker.registered(servers, 0)
        next_push = servers.pushing(await worker.described(), second)
        servers.primaries[1].deliver()
        assert [reply.version for reply in await next_push] == [2, 2]
        await asyncio.gather(push, return_exceptions=True)  # Nobody waits for it any more.

    check(scenario)


def test_places_of_a_lost_worker_go_to_one_that_waits(tmp_path: Path) -> None:
    async def scenario() -> None:
        servers = servers_of(tmp_path, num_servers=1)
        await servers.begin()
        lead = servers.lead
        (lost, _), (waiting, _) = await lead.register(0), await lead.register(1)
        leased = await lease_all(lead, 0, lost)
        assert await lead.lease(1, waiting) is None
        wait = asyncio.ensure_future(lead.await_lease(1, waiting))
        await settled()
        assert not wait.done()
        await lead.release(0)
        assert await wait == leased[0]
        with pytest.raises(LeaseLost):
            await lead.lease(0, lost)

    check(scenario)


def test_who_waits_for_places_learns_that_the_run_is_over(tmp_path: Path) -> None:
    async def scenario() -> None:
        servers = servers_of(tmp_path, num_servers=1)
        await servers.begin()
        lead = servers.lead
        (busy, _), (waiting, _) = await lead.register(0), await lead.register(1)
        spans = await lease_all(lead, 0, busy)
        wait = asyncio.ensure_future(lead.await_lease(1, waiting))
        push = push_of(PushId(0, busy, 1), spans, num_statistics=NUM_STATISTICS)
        await servers.push(push, gradients_of(servers, 1)[0])
        assert await wait is None

    check(scenario)


def test_who_found_no_places_left_does_not_hold_up_the_last_push(tmp_path: Path) -> None:
    async def scenario() -> None:
        servers = servers_of(tmp_path, num_servers=1, config=with_servers(max_clock_lead=2))
        await servers.begin()
        fast, slow = [await Worker.registered(servers, number) for number in range(2)]
        described = []
        while (push := await fast.described()).spans:
            described.append(push)
        wait = asyncio.ensure_future(servers.lead.await_lease(1, slow.token))
        await settled()
        gradients = gradients_of(servers, len(described))
        for push, gradient in zip(described, gradients, strict=True):
            await servers.push(push, gradient)
        assert await wait is None

    check(scenario)


def test_corrupt_samples_come_with_the_cut_that_holds_them(tmp_path: Path) -> None:
    corrupt = CorruptSample("a.tar", "000001", 512, "cut short")

    async def scenario() -> None:
        servers = servers_of(tmp_path, num_servers=1, save_every=1)
        await servers.begin()
        worker = await Worker.registered(servers, 0)
        for found in ((), (corrupt,)):
            await worker.push(gradients_of(servers, 1)[0], corrupt=found)
        saved = [await servers.lead.save(step, str(tmp_path / f"{step}")) for step in (1, 2)]
        assert [each.corrupt for each in saved] == [(), (corrupt,)]

    check(scenario)


def test_a_commit_that_cannot_be_applied_is_heard_of(tmp_path: Path) -> None:
    async def scenario() -> None:
        servers = servers_of(tmp_path, num_servers=2)
        await servers.begin()
        commit = await (await Worker.registered(servers, 0)).push(gradients_of(servers, 1)[0])
        follower = servers.primaries[1].server
        watch = asyncio.ensure_future(follower.watch())
        wrong = replace(commit, version=2, pushes=(PushId(7, 1, 1),))
        with pytest.raises(AssertionError, match="staged before it is committed"):
            await follower.apply(wrong)
        with pytest.raises(RuntimeError, match=r"a parameter server failed.*staged before"):
            await watch

    check(scenario)
