"""Scores of a checkpoint on the evaluation shards: one pass, in shard order, in one part or in
several.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import PurePosixPath

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from datapipe.batch import Batch, normalize
from datapipe.batch_stream import BatchStream
from datapipe.errors import CorruptSample
from datapipe.index import ShardIndex
from datapipe.labels import Label
from datapipe.lanes import even_part
from datapipe.order import SampleOrder
from datapipe.plan import sequential_batches
from datapipe.storage import read_bytes
from xdist.checkpoint import Checkpoint
from xdist.config import TrainConfig
from xdist.errors import UnknownFormat, UserError
from xdist.evaluation import ImageMeanAveragePrecision, MeanAveragePrecision, Measure, TopK
from xdist.evaluation_config import MeasureName
from xdist.flat import FlatModel
from xdist.label_space import (
    ClassWeights,
    LabelSpace,
    label_space,
    labels_at,
    read_class_weights,
    weights_of_frequencies,
)
from xdist.losses import label_rows
from xdist.state import (
    AVERAGE,
    STATISTICS,
    STATISTICS_AVERAGE,
    WEIGHTS,
    WeightsName,
    averages,
)
from xdist.worker import initial_model

logger = logging.getLogger(__name__)

ILSVRC_VALIDATION = "ILSVRC2012_val_{:08d}"
"""The name of the validation image of a number."""
ILSVRC_DIGITS = 8


@dataclass(frozen=True, eq=False)
class ScoringPlan:
    """What is scored, and on what."""

    config: TrainConfig
    num_classes: int
    """Outputs of the model."""
    index_url: str
    space: LabelSpace
    class_weights: NDArray[np.float64]
    """(C,): of every output that is scored."""
    skipped: NDArray[np.int64]
    """Samples that do not count."""


@dataclass
class Tally:
    """What was counted on the evaluation set, or on a part of it. Tallies of the parts, merged in
    order into an empty one, hold what the tally of the whole holds.
    """

    measures: dict[MeasureName, Measure]
    num_images: int = 0
    """Images that count."""
    num_skipped: int = 0
    num_labels_left_out: int = 0
    """Labels of these images that are outside of the label space."""
    num_without_labels: int = 0
    """Images that count and have no label inside of it."""
    corrupt: list[CorruptSample] = field(default_factory=list)

    @classmethod
    def empty(cls, plan: ScoringPlan) -> Tally:
        return cls({name: _measure(name, plan.class_weights) for name in measures(plan.config)})

    def merge(self, other: Tally) -> None:
        """Take what `other` has taken, after one's own."""
        for name, measure in self.measures.items():
            measure.merge(other.measures[name])
        self.num_images += other.num_images
        self.num_skipped += other.num_skipped
        self.num_labels_left_out += other.num_labels_left_out
        self.num_without_labels += other.num_without_labels
        self.corrupt += other.corrupt

    @property
    def positives(self) -> NDArray[np.int64]:
        """(C,): images that have the label."""
        return next(iter(self.measures.values())).positives

    def scores(self) -> dict[str, float]:
        """The scores of all measures, by name."""
        return {k: v for measure in self.measures.values() for k, v in measure.compute().items()}

    def per_class(self) -> dict[str, NDArray[np.float64]]:
        """The scores of the classes, by name: (C,) each."""
        return {k: v for measure in self.measures.values() for k, v in measure.per_class().items()}


def plan_scoring(
    config: TrainConfig,
    *,
    index_url: str,
    num_classes: int,
    labels: Sequence[Label],
    frequencies: Sequence[float] | None,
) -> ScoringPlan:
    """Settle what is scored of a model with `num_classes` outputs.

    `labels`: the model's, as far as they have names. `frequencies`: the training labels', by id;
    None where they are not known. Raises `UserError`, `DataError`.
    """
    index = ShardIndex.open(index_url)
    weights = _class_weights(config, labels, frequencies, num_classes=num_classes)
    evaluation_url = config.data.evaluation
    space = label_space(
        weights,
        num_labels=index.num_labels,
        model_labels=labels,
        evaluation_labels=labels_at(evaluation_url) if evaluation_url else (),
    )
    skip = config.evaluation.skip
    skipped = skipped_samples(skip, index) if skip else np.zeros(0, np.int64)
    plan = ScoringPlan(
        config, num_classes, index_url, space, weights.weights[space.outputs], skipped
    )
    logger.info(
        "evaluation prepared measures=%s images=%d skipped=%d outputs_scored=%d outputs=%d",
        ",".join(measures(config)),
        index.num_samples,
        len(skipped),
        len(space.outputs),
        num_classes,
    )
    return plan


def measures(config: TrainConfig) -> tuple[MeasureName, ...]:
    """What is measured; by default what fits the loss."""
    return config.evaluation.measures or ("top_k" if config.loss == "softmax" else "map",)


def _class_weights(
    config: TrainConfig,
    labels: Sequence[Label],
    frequencies: Sequence[float] | None,
    *,
    num_classes: int,
) -> ClassWeights:
    if config.evaluation.class_weights is not None:
        return read_class_weights(config.evaluation.class_weights, labels, num_classes=num_classes)
    if frequencies is not None:
        return weights_of_frequencies(frequencies, num_classes=num_classes)
    if measures(config) != ("top_k",):
        raise UserError(
            "MAP weights a class by its training frequency, which is not known here; give "
            "evaluation.class_weights a file"
        )
    return ClassWeights(np.full(num_classes, np.nan), np.ones(num_classes, np.bool_))


def skipped_samples(url: str, index: ShardIndex) -> NDArray[np.int64]:
    """The samples that the lines of a file name, ascending.

    A sample is known by the name of the file that was packed, or else by its key; of both, the last
    part counts. A line is such a name, with or without an extension; 293 stands for
    ILSVRC2012_val_00000293 too. Raises `UserError` when the file names none of the samples.
    """
    try:
        lines = {line.strip() for line in read_bytes(url).decode().splitlines()} - {""}
    except (OSError, ValueError) as error:
        raise UserError(f"{url}: the samples to skip cannot be read: {error}") from error
    names = {_stem(line) for line in lines}
    numbers = {name for name in names if name.isdecimal() and len(name) <= ILSVRC_DIGITS}
    names |= {ILSVRC_VALIDATION.format(int(number)) for number in numbers}
    tables = [index.table(shard) for shard in range(len(index.shards))]
    samples = [
        name or key for table in tables for name, key in zip(table.names, table.keys, strict=True)
    ]
    skipped = [number for number, sample in enumerate(samples) if _stem(sample) in names]
    if not skipped:
        raise UserError(
            f"{url}: none of its {len(lines)} lines names one of the {len(samples)} samples, which "
            f"are called like {samples[0]!r}; list names of {index.directory}"
        )
    level = logging.INFO if len(skipped) == len(lines) else logging.WARNING
    logger.log(level, "samples to skip found=%d listed=%d file=%s", len(skipped), len(lines), url)
    return np.array(skipped, np.int64)


def _stem(name: str) -> str:
    return PurePosixPath(name).name.partition(".")[0]


def num_batches(plan: ScoringPlan) -> int:
    """Batches of the evaluation set."""
    return -(-ShardIndex.open(plan.index_url).num_samples // plan.config.evaluation.batch_size)


def score_part(
    plan: ScoringPlan,
    checkpoint_url: str,
    weights: WeightsName,
    *,
    part: int = 0,
    num_parts: int = 1,
    num_cpus: float | None = None,
) -> Tally:
    """Count one of `num_parts` contiguous parts of the evaluation set, with as many threads as
    `num_cpus`, or as a worker has.

    The parts are cut between batches, so every image is computed in the same batch, and with the
    same bits, whatever their number. Raises `UserError`, `DataError`.
    """
    torch.set_num_threads(max(1, int(num_cpus or plan.config.cluster.cpus_per_worker)))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = load_model(plan.config, plan.num_classes, Checkpoint.open(checkpoint_url), weights)
    model.to(device)
    tally = Tally.empty(plan)
    with _open_stream(plan, part=part, num_parts=num_parts) as stream, torch.inference_mode():
        pixels: Tensor | None = None
        for batch_here in stream:
            batch = batch_here.to(device)
            pixels = normalize(batch.images, out=pixels)
            _count(tally, plan, model(pixels), batch)
    tally.corrupt += stream.corrupt.values()
    return tally


def _open_stream(plan: ScoringPlan, *, part: int, num_parts: int) -> BatchStream:
    index = ShardIndex.open(plan.index_url)
    data, batch_size = plan.config.data, plan.config.evaluation.batch_size
    first, stop = even_part(num_batches(plan), num_parts=num_parts, part=part)
    return BatchStream.of_plans(
        index,
        data,
        islice(sequential_batches(index.num_samples, batch_size), first, stop),
        order=SampleOrder(index.num_samples, data.block_size, 1, seed=0, shuffle=False),
        training=False,
        num_classes=plan.space.num_labels,
    )


def _count(tally: Tally, plan: ScoringPlan, logits: Tensor, batch: Batch) -> None:
    """Count a batch that was scored."""
    skipped = torch.tensor(plan.skipped, device=batch.sample_ids.device)
    is_sample = batch.sample_weights > 0
    is_skipped = torch.isin(batch.sample_ids, skipped) & is_sample
    counts = is_sample & ~is_skipped
    logits, label_ids, label_offsets, is_inside = plan.space.restrict(
        logits, batch.label_ids, batch.label_offsets
    )
    for measure in tally.measures.values():
        measure.update(logits, label_ids, label_offsets, counts.float())
    of_counted = counts[label_rows(batch.label_ids, batch.label_offsets)]
    tally.num_images += int(counts.sum())
    tally.num_skipped += int(is_skipped.sum())
    tally.num_labels_left_out += int((of_counted & ~is_inside).sum())
    tally.num_without_labels += int((label_offsets.diff() == 0)[counts].sum())


def load_model(
    config: TrainConfig, num_classes: int, checkpoint: Checkpoint, weights: WeightsName
) -> torch.nn.Module:
    """The network in evaluation mode, with raw or averaged weights and batch-norm statistics.

    Before the first update the average is the weights themselves. Raises `UserError` when the run
    keeps none, `UnknownFormat` when the checkpoint is of another network than `config` gives.
    """
    flat = FlatModel(initial_model(config, num_classes=num_classes))
    if flat.layout != checkpoint.manifest.layout:
        raise UnknownFormat(
            f"{checkpoint.url}: its weights are not those of the network that its configuration "
            "gives; use the version of this program that wrote it"
        )
    tensors = checkpoint.read_range(0, flat.layout.num_weights) | checkpoint.read_statistics()
    names = [WEIGHTS, STATISTICS]
    if weights == "average":
        if not averages(config.optimizer):
            raise UserError(f"{checkpoint.url}: the run keeps no average of its weights")
        names = [AVERAGE, STATISTICS_AVERAGE] if AVERAGE in tensors else names
    with torch.no_grad():
        flat.weights.copy_(tensors[names[0]])
        flat.statistics.copy_(tensors[names[1]])
    return flat.model.eval()


def _measure(name: MeasureName, class_weights: NDArray[np.float64]) -> Measure:
    if name == "top_k":
        return TopK(len(class_weights))
    if name == "map":
        return MeanAveragePrecision(class_weights)
    return ImageMeanAveragePrecision(class_weights)
