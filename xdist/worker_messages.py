"""What a worker tells the driver: how it joined, what it has trained, what it is at.

Without anything but torch and numpy, as the worker itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Self

from datapipe.counters import ReadCounters
from datapipe.errors import CorruptSample
from xdist.errors import LeaseLost, PeerLost
from xdist.peak_memory import PeakMemory
from xdist.profiling import Profile
from xdist.strategies import Progress

if TYPE_CHECKING:
    from xdist.share_writer import Written

Phase = Literal["idle", "starting", "joining", "data", "lease", "compute", "update", "save"]
"""What a worker does; in `update` it may wait for others, and in `lease` for samples that others
have; in all else they may wait for it.
"""


@dataclass(frozen=True)
class Parting:
    """Why a worker has parted from the others."""

    cause: str
    """What it says of who is lost, itself perhaps, in their eyes."""
    unreached: tuple[int, ...] = ()
    """The ranks of its group to which no link was up then."""

    @classmethod
    def told_by(cls, error: PeerLost | LeaseLost) -> Self:
        return cls(str(error), error.unreached if isinstance(error, PeerLost) else ())


@dataclass(frozen=True)
class WorkerReport:
    """What one call of `train` did."""

    worker: int
    host: str
    """The name of its machine."""
    progress: Progress
    """Where the run stands, as far as this worker knows, after its last update."""
    num_steps: int
    """Gradients that this worker has computed and sent."""
    num_dropped: int
    """Of these, those that came too late for an update; their samples are dealt again."""
    num_samples: int
    """Samples that counted in them; with all_reduce, those of all ranks."""
    num_images: int
    """That this worker itself computed in them."""
    loss: float
    """Mean over those samples; NaN without samples."""
    step_s: float
    """Seconds within these steps: without saving, and what is between."""
    data_wait_s: float
    """Seconds of these that the worker waited for batches."""
    peer_wait_s: float
    """Seconds of these that the worker waited for others, when it had done its own part."""
    standing_s: float | None
    """Seconds since its last update, of this call or one before; None if it has made none."""
    memory: PeakMemory
    """Of its process."""
    read: ReadCounters
    """What was read of shards meanwhile."""
    staleness: dict[int, int]
    """Staleness -> number of this worker's updates that had it, as far as it was told of them;
    empty where nothing can be stale.
    """
    corrupt: tuple[CorruptSample, ...]
    """Samples of its own that could not be decoded."""
    written: Written | None
    """What became of its share of a checkpoint, where it waited for that."""
    is_final: bool
    """No batches are left for this worker."""
    interrupted: Parting | None
    """Why it has parted from the others before its time, if it has. Its state is that of its last
    update, and it may join again.
    """
    profile: Profile | None = None
    """Of some steps of this worker, in the report that follows them, if the run is profiled."""


@dataclass(frozen=True)
class JoinReport:
    """What one call of `join` did."""

    step: int | None
    """The update whose weights the worker has; None if it has none."""
    interrupted: Parting | None
    """Why it did not join, if so."""
    num_shared: int = 0
    """Parameter servers that it shares memory with."""


@dataclass(frozen=True)
class Pulse:
    """What a worker is at, at this moment."""

    phase: Phase
    phase_s: float
    """Seconds since that began."""
    longest_step_s: float
    """Of the last hundred; 0 before the first."""
    step: int = 0
    """Of the run, as far as it knows."""
    standing_s: float | None = None
    """Of `WorkerReport`."""
