"""Mirror: the replica of a parameter server, as its primary keeps it the same."""

from __future__ import annotations

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

    def begin(self, replica: Replica, copy: ServerCopy) -> Awaitable[None]:
        """Have it from now on; it is the same once this is over."""
        self._replica = replica
        return replica.take(copy)

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

    async def _done(self, replica: Replica, told: Awaitable[None]) -> None:
        try:
            await told
        except PeerLost:
            replica.end()
            if self._replica is replica:
                self._replica = None

    def apply(self, commit: Commit) -> None:
        if self._replica is not None:
            self._replica.apply(commit)

    def free(self, name: PushId) -> None:
        if self._replica is not None:
            self._replica.free(name)

    def forget(self, worker: int, token: int) -> None:
        if self._replica is not None:
            self._replica.forget(worker, token)

    def forget_all(self, token: int) -> None:
        if self._replica is not None:
            self._replica.forget_all(token)
