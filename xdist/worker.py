"""Worker: batch -> gradient -> strategy. The only training loop in the project.

A worker knows neither its peers nor the servers: what becomes of a gradient is its strategy's
business. Commands come as arguments of `train`, state goes back in the `WorkerReport`; between two
calls nothing runs but the reading of batches. Weights, step and samples seen are the strategy's;
the worker's own state is derived from (config, seed, batch).
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from datapipe.batch import Batch, normalize
from datapipe.counters import ReadCounters
from datapipe.errors import CorruptSample
from xdist import losses
from xdist.config import TrainConfig
from xdist.flat import FlatModel
from xdist.models import build_model
from xdist.strategies import Progress, UpdateStrategy

if TYPE_CHECKING:
    from xdist.checkpoint import Part  # Keeps this module free of all but torch and numpy.

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
MakeStrategy = Callable[[FlatModel], UpdateStrategy]
MakeBatches = Callable[[Any], Iterator[Batch]]


@dataclass(frozen=True)
class WorkerReport:
    """What one call of `train` did."""

    rank: int
    progress: Progress
    """Where the run stands, as far as this worker knows, after its last update."""
    num_steps: int
    """Updates that this worker made."""
    num_samples: int
    """Samples that counted in them."""
    loss: float
    """Mean over those samples; NaN without samples."""
    seconds: float
    data_wait_s: float
    """Seconds of these that the worker waited for batches."""
    read: ReadCounters
    """What was read of shards meanwhile."""
    staleness: dict[int, int]
    """Staleness -> number of updates that had it; empty where nothing can be stale."""
    corrupt: tuple[CorruptSample, ...]
    """Samples that could not be decoded."""
    parts: tuple[Part, ...]
    """Parts of the checkpoint of `snapshot_at`, when that step was made."""
    is_final: bool
    """No batches are left for this worker."""


@dataclass
class _Segment:
    """Sums over one call of `train`."""

    device: torch.device
    started: float = field(default_factory=time.perf_counter)
    num_steps: int = 0
    num_samples: int = 0
    data_wait_s: float = 0.0
    read: ReadCounters = field(default_factory=ReadCounters)
    staleness: Counter[int] = field(default_factory=Counter)
    corrupt: list[CorruptSample] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)


class Worker:
    """One data-parallel worker. `start` builds the model, joins the group or reaches the servers,
    and begins to read.
    """

    def __init__(
        self,
        config: TrainConfig,
        *,
        rank: int,
        num_classes: int,
        make_strategy: MakeStrategy,
        make_batches: MakeBatches,
    ) -> None:
        self._config = config
        self._rank = rank
        self._num_classes = num_classes
        self._make_strategy = make_strategy
        self._make_batches = make_batches
        self._loss = make_loss(config)
        self._pixels: Tensor | None = None

    def start(self) -> None:
        """Get ready to train; whatever is wrong with data or peers is raised here, as itself."""
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if self._device.type == "cpu":
            torch.set_num_threads(max(1, int(self._config.cluster.cpus_per_worker)))
        model = initial_model(self._config, num_classes=self._num_classes)
        self._model = model.to(self._device).train()
        self._flat = FlatModel(self._model)
        self._strategy = self._make_strategy(self._flat)
        self._batches = self._make_batches(self._strategy)

    def train(self, until_step: int, snapshot_at: int | None = None) -> WorkerReport:
        """Make updates until `until_step` of the strategy's own count, or until no batch is left.

        After update `snapshot_at` the parts of a checkpoint that this worker owns are written.
        Raises `PeerLost` when somebody else is gone; no state is lost then but the update under
        way.
        """
        segment = _Segment(self._device)
        parts: tuple[Part, ...] = ()
        is_final = False
        while self._strategy.progress.own_step < until_step:
            waiting = time.perf_counter()
            batch = next(self._batches, None)
            segment.data_wait_s += time.perf_counter() - waiting
            if batch is None:
                is_final = True
                break
            self._step(batch, segment)
            if self._strategy.progress.own_step == snapshot_at:
                parts = self._strategy.save()
        return self._report(segment, parts, is_final)

    def _step(self, batch: Batch, segment: _Segment) -> None:
        loss = self._compute_gradient(batch)
        staleness = self._strategy.update(batch)
        segment.num_steps += 1
        segment.num_samples += batch.num_samples
        segment.loss_sum += loss.double() * batch.num_samples
        if staleness is not None:
            segment.staleness[staleness] += 1
        segment.corrupt.extend(batch.corrupt)
        segment.read += batch.read

    def _compute_gradient(self, batch: Batch) -> Tensor:
        """Fill the flat gradient: of the mean loss over the batch's samples. Returns that loss, ()
        float32.
        """
        step = self._strategy.progress.step
        torch.manual_seed(step_seed(self._config.seed, self._rank, step))
        batch = batch.to(self._device)
        self._flat.gradients.zero_()
        self._pixels = normalize(batch.images, out=self._pixels)
        logits = self._model(self._pixels)
        per_sample = self._loss(logits, batch.label_ids, batch.label_offsets)
        loss = losses.weighted_mean(per_sample, batch.sample_weights)
        torch.autograd.backward(loss)
        return loss.detach()

    def _report(self, segment: _Segment, parts: tuple[Part, ...], is_final: bool) -> WorkerReport:
        loss_sum = segment.loss_sum.item()
        return WorkerReport(
            rank=self._rank,
            progress=self._strategy.progress,
            num_steps=segment.num_steps,
            num_samples=segment.num_samples,
            loss=loss_sum / segment.num_samples if segment.num_samples else math.nan,
            seconds=time.perf_counter() - segment.started,
            data_wait_s=segment.data_wait_s,
            read=segment.read,
            staleness=dict(segment.staleness),
            corrupt=tuple(segment.corrupt),
            parts=parts,
            is_final=is_final,
        )


def initial_model(config: TrainConfig, *, num_classes: int) -> nn.Module:
    """The network with its initial weights: a function of (config, num_classes) alone.

    With sigmoids the classifier starts at -ln(num_classes), as labels are rare (big_vision and
    uncertainty-baselines do so for their multi-label sets).
    """
    head_bias = -math.log(num_classes) if config.loss == "sigmoid" else 0.0
    return build_model(config.model, num_classes=num_classes, head_bias=head_bias, seed=config.seed)


def make_loss(config: TrainConfig) -> Loss:
    """The loss of the configuration: (logits, label_ids, label_offsets) -> (N,), as in `losses`."""
    if config.loss == "sigmoid":
        return losses.sigmoid_cross_entropy
    return partial(losses.softmax_cross_entropy, label_smoothing=config.label_smoothing)


def step_seed(seed: int, rank: int, step: int) -> int:
    """Seed of the dropout of one worker's step."""
    words = np.random.SeedSequence((seed, rank, step)).generate_state(2, dtype=np.uint32)
    return int(words[0]) << 32 | int(words[1])
