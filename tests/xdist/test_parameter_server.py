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
from datapipe.order import SampleOrder
from datapipe.position import Position, Span
from xdist import checkpoint, optim
from xdist.checkpoint import Checkpoint, Cut, Manifest
from xdist.config import OptimizerConfig, TrainConfig
from xdist.errors import LeaseLost
from xdist.flat import FlatModel, even_ranges
from xdist.parameter_server import Commit, ParameterServer, Push, ServerPlan, Vector

NUM_SAMPLES = 40
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


class Servers:
    """Servers of one process. `deliver` decides when the followers hear of a commit."""

    def __init__(self, start: Checkpoint, *, num_servers: int, save_every: int = 10**9) -> None:
        self.ranges = even_ranges(start.manifest.layout.num_weights, num_servers)
        self.undelivered: list[Commit] = []
        plan = ServerPlan(
            config=CONFIG,
            checkpoint_url=start.url,
            start=0,
            stop=0,
            order=SampleOrder(NUM_SAMPLES, block_size=4, blocks_per_pool=2, seed=0),
            num_places=NUM_SAMPLES,
            save_every_samples=save_every,
            is_lead=False,
        )
        self.all = [
            ParameterServer(replace(plan, start=start, stop=stop, is_lead=number == 0))
            for number, (start, stop) in enumerate(self.ranges)
        ]
        self.lead = self.all[0]

    async def connect(self) -> None:
        await self.lead.connect(self.undelivered.append)

    async def deliver(self, *, reverse: bool = False) -> None:
        commits = list(reversed(self.undelivered)) if reverse else list(self.undelivered)
        self.undelivered.clear()
        for commit, follower in itertools.product(commits, self.all[1:]):
            await follower.apply(commit)

    async def stage(self, worker: int, token: int, sequence: int, gradients: Vector) -> None:
        for server, (start, stop) in zip(self.all, self.ranges, strict=True):
            await server.stage(worker, token, sequence, gradients[start:stop])

    async def push(self, worker: int, token: int, sequence: int, gradients: Vector) -> Commit:
        await self.stage(worker, token, sequence, gradients)
        span = await self.lead.lease(worker, token)
        assert span is not None
        push = Push(worker, token, sequence, (span,), (), base_version=0)
        return await self.lead.commit(push, np.ones(8, np.float32))

    async def pull(self, version: int) -> Vector:
        return np.concatenate([(await server.pull(version))[1] for server in self.all])


def gradients(size: int, count: int) -> list[Vector]:
    return [GENERATOR.standard_normal(size, np.float32) for _ in range(count)]


def check(scenario: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(scenario(), 20))


@pytest.mark.parametrize("num_servers", [1, 2, 5])
def test_any_number_of_servers_equals_one_optimizer_to_the_bit(
    tmp_path: Path, num_servers: int
) -> None:
    start = start_checkpoint(tmp_path)
    layout = start.manifest.layout
    weights = start.read_range(0, layout.num_weights)["weights"].clone()
    average = weights.clone()
    mask = layout.l2_mask("kernels")
    optimizer = optim.make_optimizer(CONFIG.optimizer, size=layout.num_weights, l2_mask=mask)
    num_samples = 0

    async def scenario() -> None:
        nonlocal num_samples
        servers = Servers(start, num_servers=num_servers)
        await servers.connect()
        token = (await servers.lead.register(0))[0]
        for sequence, gradient in enumerate(gradients(layout.num_weights, 4), start=1):
            commit = await servers.push(0, token, sequence, gradient)
            await servers.deliver()
            rate = optim.learning_rate(CONFIG.optimizer, num_samples)
            decay = optim.average_decay(
                CONFIG.optimizer,
                num_samples=commit.num_samples - num_samples,
                num_updates=sequence - 1,
            )
            optimizer.step(weights, torch.from_numpy(gradient.copy()), learning_rate=rate)
            optim.fold(average, weights, share=1 - decay)
            num_samples = commit.num_samples
            assert np.array_equal(await servers.pull(commit.version), weights.numpy())
        assert num_samples > 10  # The learning rate has decayed on the way.

    check(scenario)


def test_commits_that_arrive_in_any_order_are_applied_by_version(tmp_path: Path) -> None:
    start = start_checkpoint(tmp_path)

    async def final_weights(*, reverse: bool) -> Vector:
        servers = Servers(start, num_servers=3)
        await servers.connect()
        generator = np.random.default_rng(7)
        for worker in range(3):
            token = (await servers.lead.register(worker))[0]
            gradient = generator.standard_normal(servers.ranges[-1][1], np.float32)
            await servers.push(worker, token, 1, gradient)
        await servers.deliver(reverse=reverse)
        return await servers.pull(3)

    async def scenario() -> None:
        straight, reversed_ = await final_weights(reverse=False), await final_weights(reverse=True)
        assert np.array_equal(straight, reversed_)

    check(scenario)


def test_a_staged_push_without_commit_is_dropped(tmp_path: Path) -> None:
    start = start_checkpoint(tmp_path)

    async def scenario() -> None:
        servers = Servers(start, num_servers=2)
        await servers.connect()
        first, second = gradients(servers.ranges[-1][1], 2)
        token = (await servers.lead.register(0))[0]
        await servers.stage(0, token, 1, first)  # Its worker dies here.
        token = (await servers.lead.register(0))[0]
        await servers.push(0, token, 1, second)
        await servers.deliver()
        undisturbed = Servers(start, num_servers=2)
        await undisturbed.connect()
        token, _ = await undisturbed.lead.register(0)
        await undisturbed.push(0, token, 1, second)
        await undisturbed.deliver()
        assert np.array_equal(await servers.pull(1), await undisturbed.pull(1))

    check(scenario)


def test_a_replaced_worker_cannot_commit_nor_stage_over_its_successor(tmp_path: Path) -> None:
    start = start_checkpoint(tmp_path)

    async def scenario() -> None:
        servers = Servers(start, num_servers=2)
        await servers.connect()
        [gradient] = gradients(servers.ranges[-1][1], 1)
        old = (await servers.lead.register(0))[0]
        await servers.stage(0, old, 1, gradient)
        new = (await servers.lead.register(0))[0]
        with pytest.raises(LeaseLost):
            await servers.lead.commit(
                Push(0, old, 1, (Span(0, 0, 1),), (), base_version=0), np.ones(8, np.float32)
            )
        await servers.stage(0, new, 1, gradient)
        with pytest.raises(LeaseLost):
            await servers.stage(0, old, 2, gradient)
        before = await servers.pull(0)
        assert np.array_equal(before, start.read_range(0, len(gradient))["weights"].numpy())

    check(scenario)


def test_staleness_counts_the_commits_between_pull_and_push(tmp_path: Path) -> None:
    start = start_checkpoint(tmp_path)

    async def scenario() -> None:
        servers = Servers(start, num_servers=1)
        await servers.connect()
        tokens = [(await servers.lead.register(worker))[0] for worker in range(3)]
        [gradient] = gradients(servers.ranges[-1][1], 1)
        commits = [await servers.push(worker, tokens[worker], 1, gradient) for worker in range(3)]
        assert [commit.staleness for commit in commits] == [0, 1, 2]

    check(scenario)


def test_a_pull_waits_for_its_version(tmp_path: Path) -> None:
    start = start_checkpoint(tmp_path)

    async def scenario() -> None:
        servers = Servers(start, num_servers=2)
        await servers.connect()
        [gradient] = gradients(servers.ranges[-1][1], 1)
        commit = await servers.push(0, (await servers.lead.register(0))[0], 1, gradient)
        pull = asyncio.ensure_future(servers.all[1].pull(commit.version))
        await asyncio.sleep(0)
        assert not pull.done()
        await servers.deliver()
        assert (await pull)[0] == commit.version

    check(scenario)


def test_a_cut_holds_weights_and_ledger_of_one_version(tmp_path: Path) -> None:
    start = start_checkpoint(tmp_path)

    async def scenario() -> None:
        servers = Servers(start, num_servers=2, save_every=8)
        await servers.connect()
        next_cut = asyncio.ensure_future(servers.lead.next_cut(0))
        token = (await servers.lead.register(0))[0]
        at_version: dict[int, Vector] = {}
        positions: dict[int, Position] = {}
        for sequence, gradient in enumerate(gradients(servers.ranges[-1][1], 3), start=1):
            await servers.push(0, token, sequence, gradient)
            await servers.deliver()
            at_version[sequence] = await servers.pull(sequence)
        cut = await next_cut
        positions[cut.step] = cut.position
        url = checkpoint.checkpoint_url(str(tmp_path), cut.step)
        saved_parts = [(await server.save(cut.step, url))[0] for server in servers.all]
        parts = tuple(itertools.chain(*saved_parts))
        saved = checkpoint.publish(
            url, Manifest(cut, start.manifest.layout, parts, {}, {}, checkpoint.versions())
        )
        weights = saved.read_range(0, servers.ranges[-1][1])["weights"].numpy()
        assert np.array_equal(weights, at_version[cut.step])
        assert cut.position.num_seen(NUM_SAMPLES) == cut.num_samples >= 8
        assert cut.step < 3  # Training had gone on by the time it was written.

    check(scenario)


def test_a_successor_waits_for_its_predecessors_last_commit(tmp_path: Path) -> None:
    start = start_checkpoint(tmp_path)

    async def scenario() -> None:
        servers = Servers(start, num_servers=2)
        await servers.connect()
        first, second = gradients(servers.ranges[-1][1], 2)
        token, _ = await servers.lead.register(0)
        await servers.push(0, token, 1, first)  # Its worker dies; the follower knows nothing yet.
        token, version = await servers.lead.register(0)
        pull = asyncio.ensure_future(servers.pull(version))
        await asyncio.sleep(0)
        assert not pull.done()
        await servers.deliver()
        await pull
        await servers.push(0, token, 1, second)
        await servers.deliver()
        assert (await servers.all[1].pull(2))[0] == 2

    check(scenario)


def test_places_of_a_lost_worker_go_to_one_that_waits(tmp_path: Path) -> None:
    start = start_checkpoint(tmp_path)

    async def scenario() -> None:
        lead = Servers(start, num_servers=1).lead
        (lost, _), (waiting, _) = await lead.register(0), await lead.register(1)
        leased = await lease_all(lead, 0, lost)
        assert await lead.lease(1, waiting) is None
        wait = asyncio.ensure_future(lead.await_lease(1, waiting))
        await asyncio.sleep(0)
        assert not wait.done()
        await lead.release(0)
        assert await wait == leased[0]
        with pytest.raises(LeaseLost):
            await lead.lease(0, lost)

    check(scenario)


def test_who_waits_for_places_learns_that_the_run_is_over(tmp_path: Path) -> None:
    start = start_checkpoint(tmp_path)

    async def scenario() -> None:
        lead = Servers(start, num_servers=1).lead
        (busy, _), (waiting, _) = await lead.register(0), await lead.register(1)
        spans = tuple(await lease_all(lead, 0, busy))
        wait = asyncio.ensure_future(lead.await_lease(1, waiting))
        gradient = np.zeros(start.manifest.layout.num_weights, np.float32)
        await lead.stage(0, busy, 1, gradient)
        await lead.commit(Push(0, busy, 1, spans, (), base_version=0), np.ones(8, np.float32))
        assert await wait is None

    check(scenario)


async def lease_all(lead: ParameterServer, worker: int, token: int) -> list[Span]:
    spans = []
    while (span := await lead.lease(worker, token)) is not None:
        spans.append(span)
    return spans


def test_corrupt_samples_come_with_the_cut_that_holds_them(tmp_path: Path) -> None:
    start = start_checkpoint(tmp_path)
    corrupt = CorruptSample("a.tar", "000001", 512, "cut short")

    async def scenario() -> None:
        lead = Servers(start, num_servers=1, save_every=1).lead
        token, _ = await lead.register(0)
        gradient = np.zeros(start.manifest.layout.num_weights, np.float32)
        for sequence, found in enumerate(((), (corrupt,)), start=1):
            span = await lead.lease(0, token)
            assert span is not None
            await lead.stage(0, token, sequence, gradient)
            push = Push(0, token, sequence, (span,), found, base_version=0)
            await lead.commit(push, np.ones(8, np.float32))
        saved = [await lead.save(step, str(tmp_path / f"{step}")) for step in (1, 2)]
        assert [found for _, found in saved] == [(), (corrupt,)]

    check(scenario)


def test_a_commit_that_cannot_be_applied_is_heard_of(tmp_path: Path) -> None:
    start = start_checkpoint(tmp_path)

    async def scenario() -> None:
        servers = Servers(start, num_servers=2)
        await servers.connect()
        [gradient] = gradients(servers.ranges[-1][1], 1)
        token, _ = await servers.lead.register(0)
        commit = await servers.push(0, token, 1, gradient)
        watch = asyncio.ensure_future(servers.all[1].watch())
        wrong = replace(commit, worker=7)
        with pytest.raises(KeyError):
            await servers.all[1].apply(wrong)
        with pytest.raises(RuntimeError, match="could not be applied"):
            await watch

    check(scenario)
