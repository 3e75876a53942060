"""Servers together do what one optimizer does, in the order of commits: all of a push or none."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from datapipe.config import DataConfig
from datapipe.errors import CorruptSample
from datapipe.position import Position, Span
from tests.local_servers import LocalServers, push_of, settled
from xdist import checkpoint, optim
from xdist.checkpoint import Checkpoint, Cut, Manifest
from xdist.config import OptimizerConfig, TrainConfig
from xdist.errors import LeaseLost, PeerLost
from xdist.flat import FlatModel
from xdist.lead import Lead
from xdist.parameter_server import ParameterServer
from xdist.sequencer import Push, PushId, Vector
from xdist.servers_config import ServersConfig
from xdist.update import Update

NUM_SAMPLES = 40
NUM_STATISTICS = 8
CONFIG = TrainConfig(
    data=DataConfig(train="somewhere"),
    strategy="push_pull",
    loss="sigmoid",
    batch_size=4,
    num_epochs=1,
    optimizer=OptimizerConfig(
        name="rmsprop",
        learning_rate=0.05,
        l2=0.01,
        decay_every=10,
        average_half_life_samples=8,
    ),
)
GENERATOR = np.random.default_rng(0)


def start_checkpoint(run_dir: Path) -> Checkpoint:
    torch.manual_seed(0)
    flat = FlatModel(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    url = checkpoint.checkpoint_url(str(run_dir), 0)
    size = flat.layout.num_weights
    parts = (
        checkpoint.write_range(url, {"weights": flat.weights}, start=0, stop=size),
        checkpoint.write_statistics(url, {"statistics": flat.statistics}),
    )
    cut = Cut(0, 0, Position(), is_final=False)
    return checkpoint.publish(url, Manifest(cut, flat.layout, parts, {}, {}, {}))


def servers_of(
    run_dir: Path, *, num_servers: int, config: TrainConfig = CONFIG, save_every: int = 10**9
) -> LocalServers:
    start = start_checkpoint(run_dir)
    return LocalServers(start, config, num_servers, NUM_SAMPLES, save_every=save_every)


def with_servers(**options: Any) -> TrainConfig:
    return replace(CONFIG, servers=ServersConfig(**options))


class Worker:
    """A worker that pushes what it is told."""

    def __init__(self, servers: LocalServers, number: int, token: int) -> None:
        self._servers = servers
        self._number = number
        self.token = token
        self._sequence = 0

    @classmethod
    async def registered(cls, servers: LocalServers, number: int) -> Worker:
        return cls(servers, number, (await servers.lead.register(number))[0])

    @property
    def name(self) -> PushId:
        """Of its next push."""
        return PushId(self._number, self.token, self._sequence + 1)

    async def described(self, *, base_version: int = 0, **facts: Any) -> Push:
        """A push of the next places."""
        span = await self._servers.lead.lease(self._number, self.token)
        push = push_of(self.name, [span], num_statistics=NUM_STATISTICS, base_version=base_version)
        self._sequence += 1
        return replace(push, **facts)

    async def push(self, gradients: Vector, **facts: Any) -> Any:
        return await self._servers.push(await self.described(**facts), gradients)


def gradients_of(servers: LocalServers, count: int) -> list[Vector]:
    size = servers.ranges[-1][1]
    return [GENERATOR.standard_normal(size, np.float32) for _ in range(count)]


def check(scenario: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(scenario(), 20))


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
            optimizer.step(Update(weights, torch.from_numpy(gradient.copy()), learning_rate=rate))
            optim.fold(average, weights, share=1 - decay)
            num_samples = commit.num_samples
            assert np.array_equal(await servers.pull(commit.version), weights.numpy())
        assert num_samples > 10  # The learning rate has decayed on the way.

    check(scenario)


@pytest.mark.parametrize("reverse", [False, True])
def test_commits_that_arrive_in_any_order_are_applied_by_version(
    tmp_path: Path, reverse: bool
) -> None:
    async def final_weights(*, held_back: bool) -> Vector:
        servers = servers_of(tmp_path / str(held_back), num_servers=3)
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
        return await servers.pull(3)

    async def scenario() -> None:
        assert np.array_equal(
            await final_weights(held_back=True), await final_weights(held_back=False)
        )

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
        assert np.array_equal((await push).weights, await whole.pull(1))

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
        url = checkpoint.checkpoint_url(str(tmp_path), cut.step)
        saved_parts = [(await each.server.save(cut.step, url))[0] for each in servers.primaries]
        parts = tuple(itertools.chain(*saved_parts))
        layout = servers.start.manifest.layout
        saved = checkpoint.publish(url, Manifest(cut, layout, parts, {}, {}, checkpoint.versions()))
        weights = saved.read_range(0, layout.num_weights)["weights"].numpy()
        assert np.array_equal(weights, at_version[cut.step])
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


async def lease_all(lead: ParameterServer, worker: int, token: int) -> list[Span]:
    spans = []
    while (span := await lead.lease(worker, token)) is not None:
        spans.append(span)
    return spans


def test_corrupt_samples_come_with_the_cut_that_holds_them(tmp_path: Path) -> None:
    corrupt = CorruptSample("a.tar", "000001", 512, "cut short")

    async def scenario() -> None:
        servers = servers_of(tmp_path, num_servers=1, save_every=1)
        await servers.begin()
        worker = await Worker.registered(servers, 0)
        for found in ((), (corrupt,)):
            await worker.push(gradients_of(servers, 1)[0], corrupt=found)
        saved = [await servers.lead.save(step, str(tmp_path / f"{step}")) for step in (1, 2)]
        assert [found for _, found in saved] == [(), (corrupt,)]

    check(scenario)


def test_a_commit_that_cannot_be_applied_is_heard_of(tmp_path: Path) -> None:
    async def scenario() -> None:
        servers = servers_of(tmp_path, num_servers=2)
        await servers.begin()
        commit = await (await Worker.registered(servers, 0)).push(gradients_of(servers, 1)[0])
        follower = servers.primaries[1].server
        watch = asyncio.ensure_future(follower.watch())
        wrong = replace(commit, version=2, pushes=(PushId(7, 1, 1),))
        with pytest.raises(KeyError):
            await follower.apply(wrong)
        with pytest.raises(RuntimeError, match="could not be applied"):
            await watch

    check(scenario)


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


def lead_of(servers: LocalServers) -> Lead:
    lead = servers.lead._lead
    assert lead is not None
    return lead


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
        here, lost = [await Worker.registered(servers, number) for number in range(2)]
        push = servers.pushing(await here.described(), gradients_of(servers, 1)[0])
        await settled()
        assert not push.done()
        await lost.described()
        await servers.lead.release(1)
        assert (await push)[0].version == 1

    check(scenario)


def test_workers_begin_one_after_the_other(tmp_path: Path) -> None:
    async def scenario() -> None:
        config = with_servers(start_over_steps=4)
        servers = servers_of(tmp_path, num_servers=1, config=config)
        await servers.begin()
        first = await Worker.registered(servers, 0)
        later = asyncio.ensure_future(servers.lead.register(2))
        for _ in range(2):
            await settled()
            assert not later.done()
            await first.push(gradients_of(servers, 1)[0])
        assert (await later)[1] == 2

    check(scenario)


@pytest.mark.parametrize("number", [0, 1])
def test_a_replica_takes_over_and_nothing_is_lost(tmp_path: Path, number: int) -> None:
    async def scenario() -> None:
        servers = servers_of(tmp_path / "a", num_servers=2)
        plain = servers_of(tmp_path / "b", num_servers=2)
        for each in (servers, plain):
            await each.begin()
        for server in range(2):
            await servers.replicate(server)
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


@pytest.mark.parametrize("number", [0, 1])
def test_a_commit_that_a_new_primary_has_not_heard_of_is_made_up_for(
    tmp_path: Path, number: int
) -> None:
    """Server 1 did not hear of the last commit before a primary was lost."""

    async def scenario() -> None:
        servers = servers_of(tmp_path / "a", num_servers=2)
        plain = servers_of(tmp_path / "b", num_servers=2)
        for each in (servers, plain):
            await each.begin()
        for server in range(2):
            await servers.replicate(server)
        [gradient] = gradients_of(servers, 1)
        await (await Worker.registered(plain, 0)).push(gradient)
        worker = await Worker.registered(servers, 0)
        servers.primaries[1].held_back = []
        push = servers.pushing(await worker.described(), gradient)
        await servers.lead.pull(1)
        servers.primaries[1].forget_held_back()
        await servers.fail_over(number)
        await servers.begin()
        assert np.array_equal(await servers.pull(1), await plain.pull(1))
        if number == 0:
            with pytest.raises(PeerLost):
                await push
        push.cancel()

    check(scenario)


def test_a_push_that_was_not_committed_is_dropped_with_its_term(tmp_path: Path) -> None:
    async def scenario() -> None:
        servers = servers_of(tmp_path, num_servers=2)
        await servers.begin()
        for server in range(2):
            await servers.replicate(server)
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


def test_a_replica_that_is_lost_stops_nobody(tmp_path: Path) -> None:
    async def scenario() -> None:
        servers = servers_of(tmp_path, num_servers=2)
        await servers.begin()
        for server in range(2):
            await servers.replicate(server)
        for replica in servers.replicas:
            replica.is_dead = True
        worker = await Worker.registered(servers, 0)
        for version, gradient in enumerate(gradients_of(servers, 2), start=1):
            assert (await worker.push(gradient)).version == version

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
        servers = servers_of(tmp_path, num_servers=2)
        await servers.begin()
        for server in range(2):
            await servers.replicate(server)
        worker = await Worker.registered(servers, 0)
        await worker.push(gradients_of(servers, 1)[0])
        await servers.fail_over(0)
        await servers.begin()
        cut = await servers.lead.next_cut(0)
        assert cut is not None
        assert cut.step == 1
        saved = [await each.server.save(1, str(tmp_path / "cut")) for each in servers.primaries]
        assert [len(parts) for parts, _ in saved] == [2, 1]

    check(scenario)
