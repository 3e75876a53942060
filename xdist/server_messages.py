"""What parameter servers tell each other, and what they answer."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from torch import Tensor

from datapipe.errors import CorruptSample
from xdist.checkpoint import Part
from xdist.lead import Follower
from xdist.product import Product
from xdist.sequencer import Commit, Decision, PushId, Sequencer
from xdist.staging import StagedPiece
from xdist.wire import WireVector


@dataclass(frozen=True)
class Reply:
    """What a worker gets for a push, once that is in the weights, or was dropped."""

    version: int
    """Of the weights."""
    weights: Any
    """(stop - start,): a `WireVector`, or a reference to one, which several workers may get. None
    for a worker that sees them in memory.
    """
    commit: Commit | None = None
    """None where the push was dropped."""


@dataclass(frozen=True)
class ServerSave:
    """What became of the parts of a cut that a server owns."""

    parts: tuple[Part, ...] = ()
    corrupt: tuple[CorruptSample, ...] = ()
    """Samples met since server 0 began, where this one is it."""
    unsaved: str | None = None
    """Why they could not be written, if so. The state of the cut is kept, to be saved again."""


TermStart = int | Literal["interrupted", "lacks_updates"]
"""What came of a term: the version that a server leads it from; another one is not reached, so that
there will be a new term; or others have made updates of which the one that was to lead knows
nothing.
"""


class Server(Follower, Protocol):
    """A server, as the lead of a new term finds it."""

    def tell_of_parting(self, on_parting: Callable[[], None]) -> None:
        """From now on, call this where it may not have heard what it was told."""

    def enter(self, term: int, lead: Any) -> Awaitable[int]:
        """Have it end what belongs to the term before; it says which version it is at. lead: whom
        it tells what it has staged.
        """

    def forget_all(self, token: int) -> Awaitable[None]:
        """Drop what has a token below this one, and is in no commit that has come."""

    def staged(self, name: PushId) -> Awaitable[None]:
        """The lead: another server has staged a push."""


class Replica(Protocol):
    """The replica of a server, as that one tells it what happens."""

    def tell_of_parting(self, on_parting: Callable[[], None]) -> None:
        """From now on, call this where it may not have heard what it was told; before whoever waits
        for that.
        """

    def take(self, copy: ServerCopy) -> Awaitable[None]:
        """Be what the primary is."""

    def stage(self, name: PushId, offset: int, values: WireVector) -> Awaitable[None]:
        """Stage a part of a piece."""

    def stage_product(self, name: PushId, offset: int, product: Product) -> Awaitable[None]:
        """Stage a part of a piece that is computed there."""

    def follow(self, decision: Decision) -> Awaitable[None]:
        """The replica of server 0: know of a commit before anybody else does."""

    def apply(self, commit: Commit) -> Awaitable[None]:
        """Apply an update, in the order of versions."""

    def free(self, name: PushId) -> Awaitable[None]:
        """Drop a push."""

    def forget_all(self, token: int) -> Awaitable[None]:
        """Drop what has a token below this one, and is in no commit that has come."""

    def forget(self, worker: int, token: int) -> Awaitable[None]:
        """The same, of one worker."""

    def end(self) -> None:
        """Kill it."""


@dataclass(frozen=True)
class ServerCopy:
    """All that a replica needs to be what its primary is."""

    term: int
    version: int
    tensors: dict[str, Tensor]
    staged: dict[PushId, StagedPiece]
    pending: tuple[Commit, ...]
    sequencer: Sequencer | None
