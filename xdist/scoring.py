"""Scores of a checkpoint on the evaluation shards: one pass, in shard order."""

from __future__ import annotations

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
from xdist.state import AVERAGE, STATISTICS, STATISTICS_AVERAGE, WEIGHTS
from xdist.worker import initial_model

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
