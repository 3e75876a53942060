"""Parameter servers of one process: real ones, that may be dead, or hear late of what they are
told.
"""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Awaitable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from datapipe.order import SampleOrder
from datapipe.position import Span
from xdist.checkpoint import Checkpoint, Cut
from xdist.config import TrainConfig
from xdist.errors import PeerLost
from xdist.flat import even_ranges
from xdist.parameter_server import ParameterServer, Reply, ServerCopy
from xdist.sequencer import Commit, Decision, Push, PushId, Vector
from xdist.server_plan import ServerPlan


class LocalServer:
    """A server, as others call it: at once, and in order. While it is held back, what the lead
    tells it waits.
    """

    def __init__(self, server: ParameterServer) -> None:
        self.server = server
        self.is_dead = False
        self.held_back: list[Coroutine[Any, Any, Any]] | None = None
        self._tasks: set[asyncio.Future[Any]] = set()

    def _call(self, coroutine: Coroutine[Any, Any, Any]) -> Awaitable[Any]:
        if self.is_dead:
            coroutine.close()
            coroutine = _gone()
        task = asyncio.ensure_future(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._finished)
        return task

    def _finished(self, task: asyncio.Future[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # Whoever waits for it has it; others do not care.

    def _tell(self, coroutine: Coroutine[Any, Any, None]) -> Awaitable[None]:
        if self.held_back is None:
            return self._call(coroutine)
        self.held_back.append(coroutine)
        return self._call(_nothing())

    def deliver(self, *, reverse: bool = False) -> None:
        """Let it hear of what was held back."""
        coroutines, self.held_back = self.held_back or [], None
        for coroutine in reversed(coroutines) if reverse else coroutines:
            self._call(coroutine)

    def forget_held_back(self) -> None:
        """What was held back never arrives: who said it is lost."""
        for coroutine in self.held_back or ():
            coroutine.close()
        self.held_back = None

    def enter(self, term: int, lead: Any) -> Awaitable[int]:
        return self._call(self.server.enter(term, lead))

    def staged(self, name: PushId) -> Awaitable[None]:
        return self._call(self.server.staged(name))

    def apply(self, commit: Commit) -> Awaitable[None]:
        return self._tell(self.server.apply(commit))

    def drop(self, name: PushId, version: int) -> Awaitable[None]:
        return self._tell(self.server.drop(name, version))

    def free(self, name: PushId) -> Awaitable[None]:
        return self._call(self.server.free(name))

    def forget(self, worker: int, token: int) -> Awaitable[None]:
        return self._tell(self.server.forget(worker, token))

    def forget_all(self, token: int) -> Awaitable[None]:
        return self._tell(self.server.forget_all(token))

    def keep(self, cut: Cut) -> Awaitable[None]:
        return self._tell(self.server.keep(cut))

    def take(self, state: ServerCopy) -> Awaitable[None]:
        return self._call(self.server.take(copy.deepcopy(state)))

    def stage(self, name: PushId, offset: int, values: Any) -> Awaitable[None]:
        return self._call(self.server.stage(name, offset, values))

    def follow(self, decision: Decision) -> Awaitable[None]:
        return self._call(self.server.follow(decision))


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

    def new(self, number: int) -> LocalServer:
        start, stop = self.ranges[number]
        plan = ServerPlan(
            config=self.config,
            num_workers=self.num_workers,
            checkpoint_url=self.start.url,
            start=start,
            stop=stop,
            order=SampleOrder(self.num_samples, block_size=4, blocks_per_pool=2, seed=0),
            num_places=self.num_samples,
            save_every_samples=self.save_every,
            is_first=number == 0,
        )
        return LocalServer(ParameterServer(plan))

    @property
    def lead(self) -> ParameterServer:
        return self.primaries[0].server

    @property
    def followers(self) -> list[LocalServer]:
        return self.primaries[1:]

    async def begin(self) -> None:
        """The next term."""
        self.term += 1
        saved_step = self.start.manifest.cut.step
        assert await self.lead.begin_term(self.term, self.primaries, saved_step)

    async def replicate(self, number: int) -> None:
        """Give a server a replica."""
        replica = self.new(number)
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
