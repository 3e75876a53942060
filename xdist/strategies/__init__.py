"""What becomes of a worker's gradient: `all_reduce` (synchronous) or `push_pull` (parameter
servers).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from datapipe.batch import Batch
from xdist.computation import BatchSums
from xdist.step_phases import StepObserver

if TYPE_CHECKING:
    from xdist.share_writer import (
        Written,
    )  # Keeps the worker's step free of all but torch and numpy.


Share = tuple[int, int]
"""The number of an owner, and how many there are, of what all of them write together."""


@dataclass(frozen=True)
class Progress:
    """Where a run stands, as one worker knows it."""

    own_step: int
    """Updates this worker counts: of the group (all_reduce), or its own pushes in this life
    (push_pull).
    """
    step: int
    """Updates of the weights since the start of training."""
    num_samples: int
    """Places done since the start of training."""
    learning_rate: float
    """Of the last update."""


class UpdateStrategy(Protocol):
    """Turns the flat gradient of one worker into the next weights."""

    @property
    def progress(self) -> Progress:
        """Where the run stands."""

    @property
    def state_step(self) -> int | None:
        """The update whose weights are here; None before there are any."""

    @property
    def dropout_keys(self) -> Sequence[int]:
        """What dropout is seeded with, besides seed and step: one number, or one for each lane."""

    @property
    def seed_step(self) -> int:
        """What dropout is seeded with, too: another number for each batch of a key that is applied.
        Where nothing is on its way, the update that is done.
        """

    def join(self, membership: Any) -> None:
        """Take part in the run, for the first time or again. Raises `PeerLost`."""

    def loss_divisor(self, batch: Batch) -> float:
        """By which the sum of the losses of `batch` is divided."""

    def begin(self, batch: Batch, sums: BatchSums) -> None:
        """All forward passes of a batch are done; the last backward follows."""

    def gradient_ready(self, parameter: int) -> None:
        """The gradient of this parameter, by its number in the layout, is in the flat vector."""

    def update(self, batch: Batch, sums: BatchSums) -> None:
        """Apply the gradient of `batch`, which the flat model holds.

        Afterwards the model holds the weights of the next step, and `sums` what the whole update
        was made of. Raises `PeerLost` or `LeaseLost`, and then nothing of the update was applied
        here.
        """

    @property
    def is_dropped(self) -> bool:
        """Whether the update that was just made does not count, as others were faster; its samples
        will be in another one.
        """

    def finish(self) -> None:
        """No batch follows: see what is on its way through. Raises as `update`."""

    def take_staleness(self) -> dict[int, int]:
        """Staleness -> number of updates that had it, since the last call; empty where nothing can
        be stale.
        """

    @property
    def num_shared(self) -> int:
        """Servers that it shares memory with."""

    @property
    def lacks_samples(self) -> bool:
        """Whether it waits for samples that others have, and may give back; from any thread."""

    @property
    def is_sending(self) -> bool:
        """Whether an update is at its own part yet, for which it waits for nobody else; from any
        thread.
        """

    @property
    def wants_stop(self) -> bool:
        """Whether all ranks are to stop after the update that was just made."""

    def request_stop(self) -> None:
        """All ranks are to stop, soon, after the same update; from any thread."""

    def wait_at_most(self, timeout_s: float) -> None:
        """For others, from now on, before `PeerLost`; from any thread."""

    @property
    def peer_wait_s(self) -> float:
        """Seconds waited for others in all updates so far."""

    def observe(self, observer: StepObserver) -> None:
        """Tell this one, from now on, where the time of an update goes."""

    def save(self, share: Share) -> None:
        """Keep this worker's share of a checkpoint, if workers own the state, as of now, and begin
        to write it beside what follows.
        """

    def written(self, step: int) -> Written:
        """Wait until the share of this step is written, or cannot be; called again, it tries again;
        from any thread.
        """

    def abort(self) -> None:
        """Wait no longer for others, one of whom is lost; from any thread."""

    def leave(self) -> None:
        """Part from the others, who may wait for this worker; they get `PeerLost`."""
