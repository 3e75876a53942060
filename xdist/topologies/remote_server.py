"""RemoteServer: a parameter server actor, as other servers call it."""

from __future__ import annotations

import itertools
import uuid
from collections.abc import Awaitable, Callable
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import ObjectLostError, RayActorError, RayTaskError

from xdist.background import Background
from xdist.checkpoint import Cut
from xdist.errors import PeerLost
from xdist.product import Product
from xdist.sequencer import Commit, Decision, PushId
from xdist.server_messages import ServerCopy
from xdist.turns import Turn


class RemoteServer:
    """Calls are made at once, and begin in order; what they return may be waited for, or not. Where
    one was not heard, none that follows it begins: they wait until a new term ends them.
    """

    def __init__(self, actor: ActorHandle[Any]) -> None:
        self._actor = actor
        self._sender = uuid.uuid4().hex
        self._numbers = itertools.count()
        self._calls = Background(self._failed)
        self._on_parting: Callable[[], None] | None = None

    def __reduce__(self) -> tuple[type[RemoteServer], tuple[ActorHandle[Any]]]:
        """Whoever gets it is a sender of its own."""
        return RemoteServer, (self._actor,)

    def tell_of_parting(self, on_parting: Callable[[], None]) -> None:
        """From now on, call this where a call was not heard."""
        self._on_parting = on_parting

    def _call(self, method: str, *arguments: Any) -> Awaitable[Any]:
        turn = Turn(self._sender, next(self._numbers))
        return self._calls.run(_answer(self._actor.in_turn.remote(turn, method, *arguments)))

    def _failed(self, error: BaseException) -> None:
        # What that server raises is for who waits; what failed there, it tells the driver itself.
        is_parting = isinstance(error, PeerLost) and not isinstance(error, RayTaskError)
        if is_parting and self._on_parting is not None:
            self._on_parting()

    def enter(self, term: int, lead: RemoteServer) -> Awaitable[int]:
        return self._call("enter", term, lead)

    def staged(self, name: PushId) -> Awaitable[None]:
        return self._call("staged", name)

    def apply(self, commit: Commit) -> Awaitable[None]:
        return self._call("apply", commit)

    def drop(self, name: PushId, version: int) -> Awaitable[None]:
        return self._call("drop", name, version)

    def free(self, name: PushId) -> Awaitable[None]:
        return self._call("free", name)

    def forget(self, worker: int, token: int) -> Awaitable[None]:
        return self._call("forget", worker, token)

    def forget_all(self, token: int) -> Awaitable[None]:
        return self._call("forget_all", token)

    def keep(self, cut: Cut) -> Awaitable[None]:
        return self._call("keep", cut)

    def take(self, copy: ServerCopy) -> Awaitable[None]:
        return self._call("take", copy)

    def stage(self, name: PushId, offset: int, values: Any) -> Awaitable[None]:
        return self._call("stage", name, offset, values)

    def stage_product(self, name: PushId, offset: int, product: Product) -> Awaitable[None]:
        return self._call("stage_product", name, offset, product)

    def follow(self, decision: Decision) -> Awaitable[None]:
        return self._call("follow", decision)

    def end(self) -> None:
        """Kill it; one that is gone stays gone."""
        ray.kill(self._actor)


async def _answer(reference: ray.ObjectRef[Any]) -> Any:
    """What an actor answers. Raises `PeerLost` where it is gone, or may not have heard."""
    try:
        return await reference
    except (RayActorError, ObjectLostError) as error:
        raise PeerLost(f"a parameter server is not reached: {error}") from error
