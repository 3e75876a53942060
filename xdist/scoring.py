"""Scores of a checkpoint on the evaluation shards: one pass, in shard order; and which checkpoints
of a run are scored.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from datapipe.batch import normalize
from datapipe.errors import CorruptSample
from datapipe.index import ShardIndex
from datapipe.order import SampleOrder
from datapipe.plan import sequential_batches
from datapipe.stream import SampleStream
from xdist.checkpoint import Checkpoint
from xdist.config import TrainConfig
from xdist.evaluation import MeanAveragePrecision, Measure, TopK
from xdist.flat import FlatModel
from xdist.state import AVERAGE, STATISTICS, STATISTICS_AVERAGE, WEIGHTS, averages
from xdist.worker import initial_model

logger = logging.getLogger(__name__)

BATCH_SIZE = 64
WeightsName = Literal["average", "raw"]


@dataclass(frozen=True)
class ScoringPlan:
    """What is scored, and on what."""

    config: TrainConfig
    num_classes: int
    index_url: str
    class_weights: tuple[float, ...]
    """Of every class, for the mean average precision: the training labels' frequencies."""


@dataclass(frozen=True)
class ScoringRequest:
    """A checkpoint whose score is wanted, on one kind of its weights."""

    checkpoint: Checkpoint
    weights: WeightsName


class ScoringQueue:
    """Which checkpoint is scored next. The first one is being scored; where that takes longer than
    the next ones take to come, the newest waits and the others are passed over, in the log too.
    """

    def __init__(self, config: TrainConfig, *, save_every_samples: int) -> None:
        self._every = config.checkpoint.evaluate_every
        self._save_every_samples = save_every_samples
        self._has_average = averages(config.optimizer)
        self._requests: deque[ScoringRequest] = deque()

    @property
    def first(self) -> ScoringRequest | None:
        return self._requests[0] if self._requests else None

    @property
    def checkpoint_urls(self) -> set[str]:
        """The checkpoints that must not be deleted yet."""
        return {request.checkpoint.url for request in self._requests}

    def add(self, checkpoint: Checkpoint, *, is_last: bool) -> None:
        """Queue a new checkpoint if its turn has come; the run's last one in any case, averaged and
        raw.
        """
        number = checkpoint.manifest.cut.num_samples // self._save_every_samples
        if not is_last and (self._every == 0 or number % self._every):
            return
        while len(self._requests) > 1:
            url = self._requests.pop().checkpoint.url
            logger.warning("checkpoint not scored, as scoring takes too long checkpoint=%s", url)
        names: tuple[WeightsName, ...] = ("average", "raw") if self._has_average else ("raw",)
        self._requests.extend(
            ScoringRequest(checkpoint, name) for name in (names if is_last else names[:1])
        )

    def remove_first(self) -> None:
        """It has been scored."""
        self._requests.popleft()


def score(
    plan: ScoringPlan, checkpoint_url: str, weights: WeightsName
) -> tuple[dict[str, float], tuple[CorruptSample, ...]]:
    """Top-1 and top-5 (softmax), or weighted MAP@100 and what a constant scorer expects of it
    (sigmoid); and the samples that could not be scored.
    """
    torch.set_num_threads(max(1, int(plan.config.cluster.cpus_per_worker)))
    model = load_model(plan.config, plan.num_classes, Checkpoint.open(checkpoint_url), weights)
    measure = _measure(plan)
    index = ShardIndex.open(plan.index_url)
    order = SampleOrder(index.num_samples, plan.config.data.block_size, 1, seed=0, shuffle=False)
    batches = sequential_batches(index.num_samples, BATCH_SIZE)
    with (
        SampleStream(
            index,
            plan.config.data,
            batches,
            order=order,
            training=False,
            num_classes=plan.num_classes,
        ) as stream,
        torch.inference_mode(),
    ):
        for batch in stream:
            logits = model(normalize(batch.images))
            measure.update(logits, batch.label_ids, batch.label_offsets, batch.sample_weights)
    return measure.compute(), tuple(stream.corrupt.values())


def load_model(
    config: TrainConfig, num_classes: int, checkpoint: Checkpoint, weights: WeightsName
) -> torch.nn.Module:
    """The network in evaluation mode, with raw or averaged weights and batch-norm statistics."""
    flat = FlatModel(initial_model(config, num_classes=num_classes))
    names = (WEIGHTS, STATISTICS) if weights == "raw" else (AVERAGE, STATISTICS_AVERAGE)
    tensors = checkpoint.read_range(0, flat.layout.num_weights) | checkpoint.read_statistics()
    with torch.no_grad():
        flat.weights.copy_(tensors[names[0]])
        flat.statistics.copy_(tensors[names[1]])
    return flat.model.eval()


def class_weights(weights: Sequence[float], *, num_classes: int) -> tuple[float, ...]:
    """The labels' weights, by id; outputs beyond the labels weigh nothing."""
    return (*weights, *np.zeros(num_classes - len(weights)).tolist())


def _measure(plan: ScoringPlan) -> Measure:
    if plan.config.loss == "softmax":
        return TopK()
    return MeanAveragePrecision(np.array(plan.class_weights, np.float64))
