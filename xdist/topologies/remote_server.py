"""RemoteServer: a parameter server actor, as other servers call it."""

from __future__ import annotations

from collections.abc import Awaitable, Generator
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayActorError

from xdist.checkpoint import Cut
from xdist.errors import PeerLost
from xdist.product import Product
from xdist.sequencer import Commit, Decision, PushId
from xdist.server_messages import ServerCopy


class RemoteServer:
    """Calls are made at once, and in order; what they return may be waited for, or not."""

    def __init__(self, actor: ActorHandle[Any]) -> None:
        self._actor = actor

    def enter(self, term: int, lead: RemoteServer) -> Awaitable[int]:
        return _Answer(self._actor.enter.remote(term, lead))

    def staged(self, name: PushId) -> Awaitable[None]:
        return _Answer(self._actor.staged.remote(name))

    def apply(self, commit: Commit) -> Awaitable[None]:
        return _Answer(self._actor.apply.remote(commit))

    def drop(self, name: PushId, version: int) -> Awaitable[None]:
        return _Answer(self._actor.drop.remote(name, version))

    def free(self, name: PushId) -> Awaitable[None]:
        return _Answer(self._actor.free.remote(name))

    def forget(self, worker: int, token: int) -> Awaitable[None]:
        return _Answer(self._actor.forget.remote(worker, token))

    def forget_all(self, token: int) -> Awaitable[None]:
        return _Answer(self._actor.forget_all.remote(token))

    def keep(self, cut: Cut) -> Awaitable[None]:
        return _Answer(self._actor.keep.remote(cut))

    def take(self, copy: ServerCopy) -> Awaitable[None]:
        return _Answer(self._actor.take.remote(copy))

    def stage(self, name: PushId, offset: int, values: Any) -> Awaitable[None]:
        return _Answer(self._actor.stage.remote(name, offset, values))

    def stage_product(self, name: PushId, offset: int, product: Product) -> Awaitable[None]:
        return _Answer(self._actor.stage_product.remote(name, offset, product))

    def follow(self, decision: Decision) -> Awaitable[None]:
        return _Answer(self._actor.follow.remote(decision))


class _Answer(Awaitable[Any]):
    """What an actor answers; `PeerLost` where it is gone."""

    def __init__(self, reference: ray.ObjectRef[Any]) -> None:
        self._reference = reference

    def __await__(self) -> Generator[Any, Any, Any]:
        try:
            return (yield from self._reference.__await__())
        except RayActorError as error:
            raise PeerLost(f"a parameter server is gone: {error}") from error
