"""What becomes of a worker's gradient: `all_reduce` (synchronous) or `push_pull` (parameter
servers).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from datapipe.batch import Batch

if TYPE_CHECKING:
    from xdist.checkpoint import Part  # Keeps the worker's step free of all but torch and numpy.


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

    def update(self, batch: Batch) -> int | None:
        """Apply the gradient of `batch`, which the flat model holds; return its staleness, or None
        where nothing can be stale.

        Afterwards the model holds the weights of the next step. Raises `PeerLost` or `LeaseLost`,
        and then nothing of the update was applied here.
        """

    def save(self) -> tuple[Part, ...]:
        """Write the parts of a checkpoint that this worker owns, as of now."""
