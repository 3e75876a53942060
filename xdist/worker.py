"""Worker: batch -> gradient -> strategy. The only training loop in the project.

A worker knows neither its peers nor the servers: what becomes of a gradient is its strategy's
business. Commands come as arguments of `join` and `train`, state goes back in the `WorkerReport`;
between two calls nothing runs but the reading of batches, and the writing of its share of a
checkpoint. `pulse`, `request_stop`, `abort` and `written` are called beside them, by other threads.
Weights, step and samples seen are the strategy's; the worker's own state is derived from (config,
seed, batch).
"""

from __future__ import annotations

import logging
import math
import platform
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

from datapipe.batch import Batch
from datapipe.counters import ReadCounters
from datapipe.errors import CorruptSample
from xdist.computation import BatchSums, Computation, dropout_seed
from xdist.config import TrainConfig
from xdist.determinism import compute_deterministically
from xdist.errors import LeaseLost, PeerLost
from xdist.flat import FlatModel
from xdist.models import build_model
from xdist.peak_memory import peak_memory
from xdist.profiling import Profile, Profiler
from xdist.sizing import most_images_of_a_worker
from xdist.step_phases import Nobody
from xdist.strategies import Share, UpdateStrategy
from xdist.worker_messages import JoinReport, Parting, Phase, Pulse, WorkerReport

if TYPE_CHECKING:
    from xdist.share_writer import Written  # Keeps this module free of all but torch and numpy.

STEPS_REMEMBERED = 100


class Batches(Protocol):
    """Where a worker's batches come from, and which of them were applied."""

    def join(self, membership: Any, strategy: Any) -> None:
        """Go on where the membership says; called after the strategy has joined."""

    def take(self) -> Batch | None:
        """The next batch, or the last one if it was not applied; None when none is left."""

    def applied(self) -> None:
        """The batch that was taken last is in the weights."""


MakeStrategy = Callable[[FlatModel], UpdateStrategy]
MakeBatches = Callable[[], Batches]

logger = logging.getLogger(__name__)


@dataclass
class _Segment:
    """Sums over one call of `train`."""

    device: torch.device
    num_steps: int = 0
    num_dropped: int = 0
    num_images: int = 0
    step_s: float = 0.0
    data_wait_s: float = 0.0
    read: ReadCounters = field(default_factory=ReadCounters)
    corrupt: list[CorruptSample] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.num_samples = torch.zeros((), dtype=torch.float64, device=self.device)
        self.loss = torch.zeros((), dtype=torch.float64, device=self.device)

    def add(self, batch: Batch, sums: BatchSums, *, counts: bool) -> None:
        """counts: whether it is in the weights now."""
        self.num_steps += 1
        self.num_images += len(batch.images)
        self.read += batch.read
        if not counts:
            self.num_dropped += 1
            return
        self.corrupt.extend(batch.corrupt)
        self.num_samples += sums.num_samples
        self.loss += sums.loss


class Worker:
    """One data-parallel worker. `start` builds the model, touching nobody else; `join` takes part
    in the run; `train` makes updates.
    """

    def __init__(
        self,
        config: TrainConfig,
        *,
        number: int,
        num_classes: int,
        make_strategy: MakeStrategy,
        make_batches: MakeBatches,
    ) -> None:
        self._config = config
        self._number = number
        self._num_classes = num_classes
        self._make_strategy = make_strategy
        self._make_batches = make_batches
        self._strategy: UpdateStrategy | None = None
        self._profiler: Profiler | None = None
        self._step_seconds: deque[float] = deque(maxlen=STEPS_REMEMBERED)
        self._updated: float | None = None
        """When it made its last update."""
        self._never = threading.Event()
        self._enter("idle")

    def start(self) -> None:
        """Get ready to join; whatever is wrong with the data is raised here, as itself."""
        self._enter("starting")
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if self._config.deterministic:
            compute_deterministically()
        if self._device.type == "cpu":
            torch.set_num_threads(max(1, int(self._config.cluster.cpus_per_worker)))
        model = initial_model(self._config, num_classes=self._num_classes)
        if self._config.compute.precision == "float64":
            model = model.double()
        self._flat = FlatModel(model.to(self._device).train())
        if self._config.profile and self._number == 0:
            self._profiler = Profiler(self._device)
        observer = self._observer = self._profiler or Nobody()
        is_bound = self._device.type != "cpu" or self._config.compute.accumulation_steps > 1
        self._computation = Computation(
            self._config,
            self._flat,
            observer=observer,
            most_images=most_images_of_a_worker(self._config) if is_bound else None,
        )
        self._strategy = self._make_strategy(self._flat)
        self._strategy.observe(observer)
        self._batches = self._make_batches()

    def warm_up(self, part_sizes: Sequence[int]) -> None:
        """Compute a gradient of nothing, of a batch with so many images in each lane, so that the
        first step takes no longer than others.
        """
        self._computation.warm_up(part_sizes)

    def join(self, membership: Any) -> JoinReport:
        """Take part in the run, for the first time or again, where the membership says."""
        strategy = self._joined_strategy
        interrupted: Parting | None = None
        self._enter("joining")
        try:
            strategy.join(membership)
            self._batches.join(membership, strategy)
        except (PeerLost, LeaseLost) as error:
            interrupted = Parting.told_by(error)
        if interrupted is not None:
            strategy.leave()
        self._enter("idle")
        return JoinReport(strategy.state_step, interrupted, strategy.num_shared)

    def train(
        self, until_step: int, *, share: Share | None = None, waits: bool = True
    ) -> WorkerReport:
        """Make updates until `until_step` of the strategy's own count, or until no batch is left,
        or all ranks are asked to stop, or somebody else is lost.

        share: of a checkpoint, that this worker writes at that step; beside what follows, unless
        it waits for it.
        """
        strategy, segment = self._joined_strategy, _Segment(self._device)
        peer_wait_s = strategy.peer_wait_s
        written: Written | None = None
        is_final = False
        interrupted: Parting | None = None
        try:
            while strategy.progress.own_step < until_step and not is_final:
                is_final = not self._step(segment)
                if strategy.wants_stop:
                    break
            if is_final:
                strategy.finish()
            if share is not None and strategy.progress.own_step == until_step:
                self._enter("save")
                strategy.save(share)
                written = strategy.written(until_step) if waits else None
        except (PeerLost, LeaseLost) as error:
            interrupted = Parting.told_by(error)
        if interrupted is not None:
            strategy.leave()  # Not before the error, which refers to what is left, is gone.
        profile = self._take_profile()
        self._enter("idle")
        num_samples = segment.num_samples.item()
        return WorkerReport(
            worker=self._number,
            host=platform.node(),
            progress=strategy.progress,
            num_steps=segment.num_steps,
            num_dropped=segment.num_dropped,
            num_samples=round(num_samples),
            num_images=segment.num_images,
            loss=segment.loss.item() / num_samples if num_samples else math.nan,
            step_s=segment.step_s,
            data_wait_s=segment.data_wait_s,
            peer_wait_s=strategy.peer_wait_s - peer_wait_s,
            standing_s=self._standing_s,
            memory=peak_memory(self._device),
            read=segment.read,
            staleness=strategy.take_staleness(),
            corrupt=tuple(segment.corrupt),
            written=written,
            is_final=is_final,
            interrupted=interrupted,
            profile=profile,
        )

    def written(self, step: int) -> Written:
        """Wait until its share of the checkpoint of this step is written, or cannot be; called
        again, it tries again. Called beside all other methods.
        """
        return self._joined_strategy.written(step)

    def _take_profile(self) -> Profile | None:
        if self._profiler is None:
            return None
        self._enter("save")
        try:
            return self._profiler.take()
        except OSError as error:
            logger.warning("no profile: %s", error)
            return None

    def _step(self, segment: _Segment) -> bool:
        """Make one update; False when there is no batch for it."""
        strategy, observer = self._joined_strategy, self._observer
        started = time.perf_counter()
        self._enter("data")
        observer.enter("data")
        batch = self._batches.take()
        segment.data_wait_s += time.perf_counter() - started
        if batch is None:
            return False
        self._enter("compute")
        observer.enter("other")
        seed, step = self._config.seed, strategy.seed_step
        seeds = [dropout_seed(seed, key, step) for key in strategy.dropout_keys]
        sums = self._computation.compute(
            batch, seeds=seeds, divisor=strategy.loss_divisor(batch), listener=strategy
        )
        self._enter("update")
        strategy.update(batch, sums)
        observer.enter("other")
        self._batches.applied()
        segment.add(batch, sums, counts=not strategy.is_dropped)
        observer.end_step()
        self._updated = time.perf_counter()
        seconds = self._updated - started
        segment.step_s += seconds
        self._step_seconds.append(seconds)
        return True

    def pulse(self, wait_s: float, patience_s: float | None = None) -> Pulse:
        """What this worker is at, after `wait_s`; called beside all other methods.

        patience_s: how long it may wait for others from now on.
        """
        if patience_s is not None and self._strategy is not None:
            self._strategy.wait_at_most(patience_s)
        self._never.wait(wait_s)
        phase, since = self._phase
        step = 0
        if (strategy := self._strategy) is not None:
            step = strategy.progress.step
            if phase == "data" and strategy.lacks_samples:
                phase = "lease"
            if phase == "update" and strategy.is_sending:
                phase = "compute"
        longest = max(tuple(self._step_seconds), default=0.0)
        return Pulse(phase, time.perf_counter() - since, longest, step, self._standing_s)

    def request_stop(self) -> None:
        """Have all ranks stop soon, after the same update; called beside all other methods."""
        self._joined_strategy.request_stop()

    def abort(self) -> None:
        """Wait no longer for others, one of whom is lost; called beside all other methods."""
        self._joined_strategy.abort()

    @property
    def _standing_s(self) -> float | None:
        return None if self._updated is None else time.perf_counter() - self._updated

    @property
    def _joined_strategy(self) -> UpdateStrategy:
        assert self._strategy is not None, "start comes first"
        return self._strategy

    def _enter(self, phase: Phase) -> None:
        self._phase: tuple[Phase, float] = (phase, time.perf_counter())


def initial_model(config: TrainConfig, *, num_classes: int) -> nn.Module:
    """The network with its initial weights: a function of (config, num_classes) alone.

    With sigmoids the classifier starts at -ln(num_classes), as labels are rare (big_vision and
    uncertainty-baselines do so for their multi-label sets).
    """
    head_bias = -math.log(num_classes) if config.loss == "sigmoid" else 0.0
    return build_model(config.model, num_classes=num_classes, head_bias=head_bias, seed=config.seed)
