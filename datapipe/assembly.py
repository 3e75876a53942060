"""From samples to a Batch: decode in threads, fill the rows that have no sample.

A row without a sample (padding, or a corrupt one) repeats a good sample of its segment, else of its
batch, else the data set's first good one, with sample_weight 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from functools import cached_property
from itertools import islice

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from datapipe.batch import Batch
from datapipe.buffers import ImageBuffers
from datapipe.config import DataConfig
from datapipe.decode import DecodeError, decode_batch, image_size
from datapipe.errors import LabelOutOfRange, TooManyBadSamples
from datapipe.plan import BatchPlan
from datapipe.planned_samples import DrawnSample
from datapipe.reader import RawSample
from datapipe.transforms import augmentation_draws, evaluation_boxes, training_boxes

LARGEST_CHUNK = 16
"""Samples of one decode task: enough that handing it to a thread costs little."""

NO_LABELS = np.zeros(0, np.int64)


@dataclass(frozen=True, eq=False)
class _Row:
    """A sample, the epoch of its data set that it is read in, and the slot of its image."""

    sample: RawSample
    epoch: int
    image: NDArray[np.uint8]


@dataclass(frozen=True, eq=False)
class PendingBatch:
    """A batch whose images are being decoded; rows without a sample are None."""

    plan: BatchPlan
    rows: list[_Row | None]
    images: Tensor
    """(N, S, S, 3), uint8; the rows refer to it."""
    reasons: list[Future[list[str | None]]]
    """For the rows that have a sample, in order: why it could not be used, or None."""


class BatchMaker:
    """Starts batches in one thread; they are finished, in the same order, in another one."""

    def __init__(
        self,
        config: DataConfig,
        *,
        seed: int,
        training: bool,
        num_classes: int,
        executor: Executor,
        stand_ins: Callable[[], Iterable[DrawnSample]],
        num_bad_allowed: int,
    ) -> None:
        """stand_ins: samples of which the first good one fills a batch that has none."""
        self._config = config
        self._seed = seed
        self._training = training
        self._num_classes = num_classes
        self._executor = executor
        self._stand_ins = stand_ins
        self._num_bad_allowed = num_bad_allowed
        self._buffers = ImageBuffers(pin=torch.cuda.is_available())

    def start(self, plan: BatchPlan, samples: Sequence[DrawnSample | None]) -> PendingBatch:
        """samples: one for each row of the plan, None where the row only fills a place."""
        images = self._buffers.take(plan.size, self._config.image_size)
        rows = [
            None if drawn is None else _Row(drawn.sample, drawn.epoch, pixels)
            for drawn, pixels in zip(samples, images.numpy(), strict=True)
        ]
        filled = [row for row in rows if row is not None]
        size = min(LARGEST_CHUNK, -(-len(filled) // self._config.decode_threads) or 1)
        reasons = [
            self._executor.submit(self._decode, filled[first : first + size])
            for first in range(0, len(filled), size)
        ]
        return PendingBatch(plan, rows, images, reasons)

    def finish(self, pending: PendingBatch) -> Batch:
        """Wait for the images. Errors: `LabelOutOfRange`; `TooManyBadSamples` if none decodes."""
        reasons = iter([reason for task in pending.reasons for reason in task.result()])
        samples = [row.sample if row else None for row in pending.rows]
        corrupt = []
        for number, sample in enumerate(samples):
            if sample is not None and (reason := next(reasons)) is not None:
                corrupt.append(sample.corrupt(reason))
                samples[number] = None
        is_good = np.array([sample is not None for sample in samples])
        segment_sizes = tuple(segment.size for segment in pending.plan.segments)
        self._fill(samples, pending.images.numpy(), sources(is_good, segment_sizes))
        filled = [sample for sample in samples if sample is not None]
        label_ids, label_offsets = self._labels(filled)
        return Batch(
            images=pending.images,
            label_ids=torch.from_numpy(label_ids),
            label_offsets=torch.from_numpy(label_offsets),
            sample_weights=torch.from_numpy(is_good.astype(np.float32)),
            sample_ids=torch.tensor([sample.sample_id for sample in filled], dtype=torch.int64),
            spans=pending.plan.spans,
            segment_sizes=segment_sizes,
            num_samples=int(is_good.sum()),
            corrupt=tuple(corrupt),
        )

    def _decode(self, rows: Sequence[_Row]) -> list[str | None]:
        """Decode into the rows' images; for each row, why that failed, or None."""
        reasons: list[str | None] = []
        sizes = []
        for row in rows:
            try:
                sizes.append(_checked_size(row.sample))
                reasons.append(None)
            except DecodeError as error:
                sizes.append((1, 1))
                reasons.append(str(error))
        boxes, flips = self._boxes(rows, np.array(sizes, np.float64))
        sound = [number for number, reason in enumerate(reasons) if reason is None]
        found = decode_batch(
            [payload for number in sound if (payload := rows[number].sample.payload) is not None],
            [boxes[number] for number in sound],
            [flips[number] for number in sound],
            [rows[number].image for number in sound],
        )
        for number, reason in zip(sound, found, strict=True):
            reasons[number] = reason
        return reasons

    def _boxes(
        self, rows: Sequence[_Row], sizes: NDArray[np.float64]
    ) -> tuple[list[tuple[float, float, float, float]], list[bool]]:
        widths, heights = sizes[:, 0], sizes[:, 1]
        if not self._training:
            boxes = evaluation_boxes(widths, heights, self._config)
            return [tuple(box) for box in boxes.tolist()], [False] * len(rows)
        draws = augmentation_draws(
            self._seed,
            np.array([row.epoch for row in rows], np.int64),
            np.array([row.sample.sample_id for row in rows], np.int64),
        )
        boxes, flips = training_boxes(widths, heights, draws, self._config)
        return [tuple(box) for box in boxes.tolist()], flips.tolist()

    def _fill(
        self,
        samples: list[RawSample | None],
        images: NDArray[np.uint8],
        source_rows: NDArray[np.int64],
    ) -> None:
        """Give each row without a sample the one of its source row, or the stand-in."""
        for number, source in enumerate(source_rows.tolist()):
            if source == number:
                continue
            if source < 0:
                samples[number] = self._stand_in.sample
                images[number] = self._stand_in.image
            else:
                samples[number] = samples[source]
                images[number] = images[source]

    @cached_property
    def _stand_in(self) -> _Row:
        """The first good sample of the data set's first epoch: what a batch without any repeats."""
        side = self._config.image_size
        corrupt = []
        for drawn in islice(self._stand_ins(), self._num_bad_allowed + 1):
            row = _Row(drawn.sample, drawn.epoch, np.empty((side, side, 3), np.uint8))
            (reason,) = self._decode([row])
            if reason is None:
                return row
            corrupt.append(drawn.sample.corrupt(reason))
        raise TooManyBadSamples(tuple(corrupt), self._num_bad_allowed)

    def _labels(self, samples: Sequence[RawSample]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Labels of all rows as ids and offsets."""
        labels = [NO_LABELS if sample.labels is None else sample.labels for sample in samples]
        label_ids = np.concatenate([NO_LABELS, *labels])
        if label_ids.size and label_ids.max() >= self._num_classes:
            self._raise_out_of_range(samples)
        offsets = np.zeros(len(labels) + 1, np.int64)
        np.cumsum([len(ids) for ids in labels], out=offsets[1:])
        return label_ids, offsets

    def _raise_out_of_range(self, samples: Sequence[RawSample]) -> None:
        for sample in samples:
            largest = max(() if sample.labels is None else sample.labels.tolist(), default=0)
            if largest >= self._num_classes:
                raise LabelOutOfRange(sample.shard, sample.key, largest, self._num_classes)


def sources(is_good: NDArray[np.bool_], segment_sizes: Sequence[int]) -> NDArray[np.int64]:
    """For each row, whose sample it shows: its own if good, else a good row's in turn, else -1."""
    rows = np.arange(len(is_good), dtype=np.int64)
    result = np.where(is_good, rows, -1)
    end = 0
    for size in segment_sizes:
        start, end = end, end + size
        _repeat(result[start:end])
    _repeat(result)
    return result


def _repeat(source_rows: NDArray[np.int64]) -> None:
    """Replace, in place, the -1 by the other values in turn, where there are any."""
    good, missing = source_rows[source_rows >= 0], np.flatnonzero(source_rows < 0)
    if good.size:
        source_rows[missing] = good[np.arange(missing.size) % good.size]


def _checked_size(sample: RawSample) -> tuple[int, int]:
    """(width, height) of a sample whose bytes are sound. Raises `DecodeError`."""
    problem = sample.problem()
    if problem is not None or sample.payload is None:
        raise DecodeError(problem)
    if sample.width > 0 and sample.height > 0:
        return sample.width, sample.height
    return image_size(sample.payload)
