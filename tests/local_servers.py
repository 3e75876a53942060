"""Parameter servers of one process: real ones, that may be dead, or hear late of what they are
told.
"""

from __future__ import annotations

import asyncio
import copy
import itertools
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from datapipe.config import DataConfig
from datapipe.order import SampleOrder
from datapipe.position import Position, Span
from xdist import checkpoint
from xdist.checkpoint import Checkpoint, Cut, Manifest
from xdist.config import OptimizerConfig, TrainConfig
from xdist.errors import PeerLost
from xdist.flat import FlatModel, even_ranges
from xdist.lead import Lead
from xdist.parameter_server import ParameterServer
from xdist.product import Product
from xdist.sequencer import Commit, Decision, Push, PushId, Vector
from xdist.server_messages import Reply, ServerCopy, TermStart
from xdist.server_plan import ServerPlan
from xdist.servers_config import ServersConfig
from xdist.turns import Turn


class LocalServer:
    """A server, as others call it: at once, to begin in order. While it is held back, what the lead
    tells it waits.
    """

    def __init__(self, server: ParameterServer) -> None:
        self.server = server
        self.is_dead = False
        self.was_ended = False
        self.held_back: list[Coroutine[Any, Any, Any]] | None = None
        self._tasks: set[asyncio.Future[Any]] = set()
        self._on_parting: Callable[[], None] = lambda: None
        self._senders = itertools.count()
        self.begin_as_another()

    def begin_as_another(self) -> None:
        self._sender, self._numbers = f"sender {next(self._senders)}", itertools.count()

    def _call(self, method: str, *arguments: Any) -> Awaitable[Any]:
        return self._run(_gone() if self.is_dead else self._asked(method, *arguments))

    def _asked(self, method: str, *arguments: Any) -> Coroutine[Any, Any, Any]:
        return self.server.in_turn(Turn(self._sender, next(self._numbers)), method, *arguments)

    def tell_of_parting(self, on_parting: Callable[[], None]) -> None:
        self._on_parting = on_parting

    def _run(self, coroutine: Coroutine[Any, Any, Any]) -> Awaitable[Any]:
        task = asyncio.ensure_future(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._finished)
        return task

    def _finished(self, task: asyncio.Future[Any]) -> None:
        self._tasks.discard(task)
        # Whoever waits for it has it.
        if not task.cancelled() and isinstance(task.exception(), PeerLost):
            self._on_parting()

    def _tell(self, method: str, *arguments: Any) -> Awaitable[None]:
        if self.held_back is None:
            return self._call(method, *arguments)
        self.held_back.append(self._asked(method, *arguments))
        return self._run(_nothing())

    def deliver(self, *, reverse: bool = False) -> None:
        """Let it hear of what was held back."""
        coroutines, self.held_back = self.held_back or [], None
        for coroutine in reversed(coroutines) if reverse else coroutines:
            self._run(coroutine)

    def forget_held_back(self) -> None:
        """What was held back never arrives: who said it is lost."""
        for coroutine in self.held_back or ():
            coroutine.close()
        self.held_back = None
        self.begin_as_another()

    def enter(self, term: int, lead: Any) -> Awaitable[int]:
        return self._call("enter", term, lead)

    def staged(self, name: PushId) -> Awaitable[None]:
        return self._call("staged", name)

    def apply(self, commit: Commit) -> Awaitable[None]:
        return self._tell("apply", commit)

    def drop(self, name: PushId, version: int) -> Awaitable[None]:
        return self._tell("drop", name, version)

    def free(self, name: PushId) -> Awaitable[None]:
        return self._call("free", name)

    def forget(self, worker: int, token: int) -> Awaitable[None]:
        return self._tell("forget", worker, token)

    def forget_all(self, token: int) -> Awaitable[None]:
        return self._tell("forget_all", token)

    def keep(self, cut: Cut) -> Awaitable[None]:
        return self._tell("keep", cut)

    def take(self, state: ServerCopy) -> Awaitable[None]:
        return self._call("take", copy.deepcopy(state))

    def stage(self, name: PushId, offset: int, values: Any) -> Awaitable[None]:
        """Of a copy, as Ray makes one at the call: a worker's slots are written again before a
        replica applies what was in them.
        """
        return self._call("stage", name, offset, np.copy(values))

    def stage_product(self, name: PushId, offset: int, product: Product) -> Awaitable[None]:
        return self._call("stage_product", name, offset, product)

    def follow(self, decision: Decision) -> Awaitable[None]:
        return self._call("follow", decision)

    def end(self) -> None:
        self.is_dead = self.was_ended = True


async def _gone() -> None:
    raise PeerLost("a parameter server is gone")


async def _nothing() -> None:
    """Nothing happens yet."""


@dataclass
class LocalServers:
    """The servers of a run, and what a worker asks of them all."""

    start: Checkpoint
    config: TrainConfig
    num_servers: int
    num_samples: int
    save_every: int = 10**9
    num_workers: int = 4
    term: int = 0
    replicas: list[LocalServer] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.ranges = even_ranges(self.start.manifest.layout.num_weights, self.num_servers)
        self.primaries = [self.new(number) for number in range(self.num_servers)]

    def new(self, number: int, *, is_replica: bool = False) -> LocalServer:
        start, stop = self.ranges[number]
        plan = ServerPlan(
            config=self.config,
            most_workers=self.num_workers,
            checkpoint_url=None if is_replica else self.start.url,
            layout=self.start.manifest.layout,
            start=start,
            stop=stop,
            order=SampleOrder(self.num_samples, block_size=4, blocks_per_pool=2, seed=0),
            num_places=self.num_samples,
            save_every_samples=self.save_every,
            is_first=number == 0,
        )
        server = ParameterServer(plan, share=np.copy)
        torch.set_num_threads(1)  # As all tests have it: the bits of a gradient depend on it.
        return LocalServer(server)

    @property
    def lead(self) -> ParameterServer:
        return self.primaries[0].server

    @property
    def followers(self) -> list[LocalServer]:
        return self.primaries[1:]

    async def begin(self) -> None:
        """The next term."""
        assert isinstance(await self.begin_term(), int)

    async def begin_term(self) -> TermStart:
        self.term += 1
        for primary in self.primaries:  # As actors' handles do when they are sent.
            primary.begin_as_another()
        saved_step = self.start.manifest.cut.step
        return await self.lead.begin_term(self.term, self.primaries, saved_step)

    async def replicate(self, number: int) -> None:
        """Give a server a replica."""
        replica = self.new(number, is_replica=True)
        assert await self.primaries[number].server.attach(replica)
        self.replicas.insert(number, replica)

    async def fail_over(self, number: int) -> None:
        """A primary is lost, and its replica takes its place; the next term is yet to begin."""
        self.primaries[number].is_dead = True
        self.primaries[number] = self.replicas.pop(number)

    async def stage(self, name: PushId, gradients: Vector) -> None:
        for primary, (start, stop) in zip(self.primaries, self.ranges, strict=True):
            await primary.server.stage(name, 0, gradients[start:stop])

    def pushing(self, push: Push, gradients: Vector) -> asyncio.Future[list[Reply]]:
        """A push that is under way."""

        async def all_of_it() -> list[Reply]:
            await self.stage(push.id, gradients)
            lead, *others = (primary.server for primary in self.primaries)
            described = [lead.push(push.id, push), *(other.push(push.id) for other in others)]
            return await asyncio.gather(*described)

        return asyncio.ensure_future(all_of_it())

    async def push(self, push: Push, gradients: Vector) -> Commit:
        """A push that is committed."""
        commit = (await self.pushing(push, gradients))[0].commit
        assert commit is not None
        return commit

    async def pull(self, version: int) -> Vector:
        return np.concatenate(
            [(await primary.server.pull(version)).weights for primary in self.primaries]
        )


async def settled() -> None:
    """All that can go on without news has done so."""
    for _ in range(50):
        await asyncio.sleep(0)


def push_of(
    name: PushId, spans: Sequence[Span | None], *, num_statistics: int, base_version: int = 0
) -> Push:
    """A push of these places."""
    places = tuple(span for span in spans if span is not None)
    return Push(name, places, (), base_version, np.ones(num_statistics, np.float32))


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


def start_checkpoint(run_dir: Path, flat: FlatModel) -> Checkpoint:
    """A run that begins with the weights and statistics of a model."""
    checkpoint.make_directory(str(run_dir))
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
    torch.manual_seed(0)
    start = start_checkpoint(
        run_dir, FlatModel(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    )
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


def lead_of(servers: LocalServers) -> Lead:
    lead = servers.lead._lead
    assert lead is not None
    return lead


async def lease_all(lead: ParameterServer, worker: int, token: int) -> list[Span]:
    spans = []
    while (span := await lead.lease(worker, token)) is not None:
        spans.append(span)
    return spans
