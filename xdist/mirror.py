"""Mirror: the replica of a parameter server, as its primary keeps it the same."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial

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
        self._staging: dict[PushId, list[Awaitable[None]]] = {}

    def begin(self, replica: Replica, copy: ServerCopy) -> Awaitable[bool]:
        """Have it from now on; it is the same once this is over. False where it is gone."""
        self._replica = replica
        replica.tell_of_parting(partial(self._end, replica))
        return _is_heard(replica.take(copy))

    def _end(self, replica: Replica) -> None:
        """It may not have heard what it was told."""
        replica.end()
        if self._replica is replica:
            self._replica = None

    def stage(self, name: PushId, offset: int, values: WireVector) -> None:
        if self._replica is not None:
            self._add(name, self._replica.stage(name, offset, values))

    def stage_product(self, name: PushId, offset: int, product: Product) -> None:
        if self._replica is not None:
            self._add(name, self._replica.stage_product(name, offset, product))

    def _add(self, name: PushId, staged: Awaitable[None]) -> None:
        self._staging.setdefault(name, []).append(staged)

    async def until_staged(self, name: PushId) -> None:
        """What was staged of a push is there too. Raises `LeaseLost`."""
        for staged in self._staging.pop(name, ()):
            await _is_heard(staged)

    def keep_staging(self, is_wanted: Callable[[PushId], bool]) -> None:
        """Wait for no other pushes."""
        self._staging = {name: of for name, of in self._staging.items() if is_wanted(name)}

    async def follow(self, decision: Decision) -> None:
        if self._replica is not None:
            await _is_heard(self._replica.follow(decision))

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


async def _is_heard(told: Awaitable[None]) -> bool:
    """Wait until a replica has done what it was told; False where it may not have heard."""
    try:
        await told
    except PeerLost:
        return False
    return True
