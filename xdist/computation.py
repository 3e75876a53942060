"""Computation: from a batch to its gradient, in the flat vector of the model.

A batch is computed in parts, one after the other: its lanes, where they are the groups of batch
norm, else as many as `compute.accumulation_steps` says, or more, where others are lost and a worker
has their images too: no part is larger than usual, as memory may not be there for it. As soon as
the backward of the last part has a parameter's gradient, the listener is told: whoever sends it can
do so meanwhile. A compiled model has all gradients at the end of backward, and a CUDA graph at its
own end.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from datapipe.batch import Batch
from xdist import losses, step_phases
from xdist.config import TrainConfig
from xdist.cuda_graphs import CudaGraphs
from xdist.errors import UserError
from xdist.flat import FlatModel, even_ranges
from xdist.part_loss import Loss, Part, PartLoss
from xdist.step_phases import StepObserver

NUM_COUNTS = 4


class BatchSums:
    """What is summed over the parts of a batch, and by an all-reduce over those of all ranks: one
    vector, (S + 4,), of the weights' type.
    """

    def __init__(self, flat: FlatModel) -> None:
        self.vector = flat.weights.new_zeros(len(flat.statistics) + NUM_COUNTS)
        self.statistics = self.vector[:-NUM_COUNTS]
        """(S,): batch-norm statistics of the parts that have samples."""
        self.num_parts, self.num_samples, self.loss, self.stop_votes = self.vector[-NUM_COUNTS:]
        """Parts with samples; samples that count; the sum of their losses; ranks that want to stop
        after this step. () each.
        """


class GradientListener(Protocol):
    """Is told how far a batch's gradient has come."""

    def begin(self, batch: Batch, sums: BatchSums) -> None:
        """All forward passes of the batch are done; the last backward follows."""

    def gradient_ready(self, parameter: int) -> None:
        """The gradient of this parameter, by its number in the layout, is in the flat vector."""


class Nobody:
    """A listener who does not care."""

    def begin(self, batch: Batch, sums: BatchSums) -> None:
        """Nothing is sent."""

    def gradient_ready(self, parameter: int) -> None:
        """Nothing is sent."""


class Computation:
    """Computes the gradients of one model."""

    def __init__(
        self,
        config: TrainConfig,
        flat: FlatModel,
        *,
        observer: StepObserver | None = None,
        most_images: int | None = None,
    ) -> None:
        """most_images: that memory is there for in `compute.accumulation_steps` parts; None: any
        number. Raises `UserError` for CUDA graphs without a GPU.
        """
        self._config = config
        self._most_images = most_images
        self._flat = flat
        self._loss = PartLoss(config.compute, flat, loss=make_loss(config))
        self._sums = BatchSums(flat)
        self._listener: GradientListener | None = None
        self._observer = observer or step_phases.Nobody()
        self._is_first = True
        self._begin_part = self._forward
        if config.compute.cuda_graphs:
            _check_has_gpu(flat)
            self._graphs = CudaGraphs(self._forward_and_backward, accumulated=flat.gradients)
            self._begin_part = self._replay
        parameters: list[Any] = list(flat.model.parameters())
        for number, parameter in enumerate(parameters):
            parameter.register_post_accumulate_grad_hook(partial(self._collect, number))

    def compute(
        self, batch: Batch, *, seeds: Sequence[int], divisor: float, listener: GradientListener
    ) -> BatchSums:
        """Fill `flat.gradients` with the gradient of sum(sample_weight * loss) / divisor.

        seeds: of dropout; one for each lane with bn_group lane, else one for the batch. The sums
        that are returned are those that `listener.begin` got, and valid until the next call.
        """
        rows = self._rows(batch)
        is_filled = [bool(batch.sample_weights[start:stop].any()) for start, stop in rows]
        parts = self._parts(batch, rows)
        self._sums.vector.zero_()
        self._listener = None
        for number, part in enumerate(parts):
            if number < len(seeds):
                torch.manual_seed(seeds[number])
            loss, finish = self._begin_part(part, divisor, is_first=number == 0)
            self._sums.loss += loss
            if is_filled[number]:
                self._sums.statistics += self._flat.statistics
                self._sums.num_parts += 1
            if number == len(rows) - 1:
                self._sums.num_samples += batch.num_samples
                self._listener = listener
                listener.begin(batch, self._sums)
            finish()
        return self._sums

    def _forward(
        self, part: Part, divisor: float, *, is_first: bool
    ) -> tuple[Tensor, Callable[[], None]]:
        """The loss of a part, and what is left to do for its gradient."""
        self._observer.enter("forward")
        loss = self._loss(part)

        def backward() -> None:
            self._observer.enter("backward")
            self._is_first = is_first
            torch.autograd.backward(loss / divisor)

        return loss.detach(), backward

    def _replay(
        self, part: Part, divisor: float, *, is_first: bool
    ) -> tuple[Tensor, Callable[[], None]]:
        """The same as `_forward`, when all is done: nothing is left but to say so."""
        self._observer.enter("replay")
        by = self._sums.vector.new_full((), divisor)
        return self._graphs(*part, by, is_first=is_first), self._tell_of_all

    def _forward_and_backward(self, *part_and_divisor: Tensor, is_first: bool) -> Tensor:
        """What a CUDA graph records."""
        *part, divisor = part_and_divisor
        loss = self._loss(Part(*part))
        self._is_first = is_first
        torch.autograd.backward(loss / divisor)
        return loss.detach()

    def _tell_of_all(self) -> None:
        if self._listener is not None:
            for number in reversed(range(len(self._flat.layout.parameters))):
                self._listener.gradient_ready(number)

    def warm_up(self, part_sizes: Sequence[int]) -> None:
        """Compute the gradient of black images without labels, so many in each lane."""
        num_images = sum(part_sizes)
        side = self._config.data.image_size
        batch = Batch(
            images=torch.zeros(num_images, side, side, 3, dtype=torch.uint8),
            label_ids=torch.zeros(0, dtype=torch.int64),
            label_offsets=torch.zeros(num_images + 1, dtype=torch.int64),
            sample_weights=torch.ones(num_images),
            sample_ids=torch.zeros(num_images, dtype=torch.int64),
            spans=(),
            segment_sizes=tuple(part_sizes),
            num_samples=num_images,
            corrupt=(),
        )
        self.compute(batch, seeds=(), divisor=1.0, listener=Nobody())

    def _rows(self, batch: Batch) -> list[tuple[int, int]]:
        """Rows [start, stop) of each part."""
        if self._config.bn_group == "lane":
            stops = itertools.accumulate(batch.segment_sizes, initial=0)
            return list(itertools.pairwise(stops))
        num_images, num_parts = len(batch.sample_weights), self._config.compute.accumulation_steps
        if self._most_images is not None:
            usual = -(-self._most_images // num_parts)
            num_parts = max(num_parts, -(-num_images // usual))
        return list(even_ranges(num_images, min(num_parts, num_images)))

    def _parts(self, batch: Batch, rows: Sequence[tuple[int, int]]) -> list[Part]:
        """The parts of a batch, on the device, without waiting for it."""
        labels = [int(batch.label_offsets[start]) for start, _ in rows] + [len(batch.label_ids)]
        batch = batch.to(self._flat.weights.device)
        return [
            self._loss.prepare(
                Part(
                    batch.images[start:stop],
                    batch.label_ids[first:last],
                    batch.label_offsets[start : stop + 1] - first,
                    batch.sample_weights[start:stop],
                )
            )
            for (start, stop), (first, last) in zip(rows, itertools.pairwise(labels), strict=True)
        ]

    def _collect(self, number: int, parameter: Tensor) -> None:
        """Bring a gradient into the flat vector: copied for the first part, which spares setting
        the vector to zero, added for those that follow.
        """
        assert parameter.grad is not None
        self._flat.collect(number, parameter.grad, adds=not self._is_first)
        parameter.grad = None
        if self._listener is not None:
            self._listener.gradient_ready(number)


def _check_has_gpu(flat: FlatModel) -> None:
    if flat.weights.device.type != "cuda":
        raise UserError(
            "compute.cuda_graphs is True; allowed: False for workers without a GPU; leave it out, "
            "or set cluster.gpus_per_worker"
        )


def make_loss(config: TrainConfig) -> Loss:
    """The loss of the configuration: (logits, label_ids, label_offsets) -> (N,), as in `losses`."""
    if config.loss == "sigmoid":
        return losses.sigmoid_cross_entropy
    return partial(losses.softmax_cross_entropy, label_smoothing=config.label_smoothing)


def dropout_seed(seed: int, key: int, step: int) -> int:
    """Seed of the dropout of one part (by rank, worker or lane: `key`) of a step."""
    words = np.random.SeedSequence((seed, key, step)).generate_state(2, dtype=np.uint32)
    return int(words[0]) << 32 | int(words[1])
