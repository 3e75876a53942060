"""Mirror: the replica of a parameter server, as its primary keeps it the same."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from xdist.errors import PeerLost
from xdist.product import Product
from xdist.sequencer import Commit, Decision, PushId
from xdist.server_messages import Replica, ServerCopy
from xdist.wire import WireVector


class Mirror:
    """There may be no replica; then nothing happens. One that does not answer is ended: it must not
    take over, as it lacks what it was told.
    """

    def __init__(self) -> None:
        self._replica: Replica | None = None
        self._staging: dict[PushId, list[tuple[Replica, Awaitable[None]]]] = {}
        self._tellings: set[asyncio.Future[bool]] = set()

    def begin(self, replica: Replica, copy: ServerCopy) -> Awaitable[bool]:
        """Have it from now on; it is the same once this is over. False where it is gone."""
        self._replica = replica
        return self._done(replica, replica.take(copy))

    def stage(self, name: PushId, offset: int, values: WireVector) -> None:
        if self._replica is not None:
            self._add(name, self._replica, self._replica.stage(name, offset, values))

    def stage_product(self, name: PushId, offset: int, product: Product) -> None:
        if self._replica is not None:
            self._add(name, self._replica, self._replica.stage_product(name, offset, product))

    def _add(self, name: PushId, replica: Replica, staged: Awaitable[None]) -> None:
        self._staging.setdefault(name, []).append((replica, staged))

    async def until_staged(self, name: PushId) -> None:
        """What was staged of a push is there too. Raises `LeaseLost`."""
        for replica, staged in self._staging.pop(name, ()):
            await self._done(replica, staged)

    def keep_staging(self, is_wanted: Callable[[PushId], bool]) -> None:
        """Wait for no other pushes."""
        self._staging = {name: of for name, of in self._staging.items() if is_wanted(name)}

    async def follow(self, decision: Decision) -> None:
        if self._replica is not None:
            await self._done(self._replica, self._replica.follow(decision))

    async def _done(self, replica: Replica, told: Awaitable[None]) -> bool:
        try:
            await told
        except PeerLost:
            replica.end()
            if self._replica is replica:
                self._replica = None
            return False
        return True

    def apply(self, commit: Commit) -> None:
        self._tell(lambda replica: replica.apply(commit))

    def free(self, name: PushId) -> None:
        self._tell(lambda replica: replica.free(name))

    def forget(self, worker: int, token: int) -> None:
        self._tell(lambda replica: replica.forget(worker, token))

    def forget_all(self, token: int) -> None:
        self._tell(lambda replica: replica.forget_all(token))

    def _tell(self, message: Callable[[Replica], Awaitable[None]]) -> None:
        """Nobody waits for it; but one that does not hear of it is ended."""
        if self._replica is not None:
            telling = asyncio.ensure_future(self._done(self._replica, message(self._replica)))
            self._tellings.add(telling)
            telling.add_done_callback(self._told)

    def _told(self, telling: asyncio.Future[bool]) -> None:
        self._tellings.discard(telling)
        if not telling.cancelled():
            telling.exception()  # What a replica raises, it tells the driver itself.
