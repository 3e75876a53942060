"""PartLoss: the loss of one part of a batch, as `compute` says it is to be computed.

Pixels come in channels-last format out of `normalize`, and every layer keeps the format of what it
gets. On CPUs they always do: a step of Xception takes two thirds of the time that way, one of a
ResNet four fifths, one of VGG as long. Kernels stay as they lie in the flat vector: torch's
convolutions bring them into the format of their input as they use them. That costs nothing for
pointwise and depthwise kernels, where both formats are the same, and for all kernels of a ResNet
3 ms of a step of 120 ms.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from datapipe.batch import normalize
from xdist.compute_config import ComputeConfig
from xdist.flat import FlatModel

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


class Part(NamedTuple):
    """Some rows of a batch, on the device; see `Batch`."""

    images: Tensor
    label_ids: Tensor
    label_offsets: Tensor
    sample_weights: Tensor


class PartLoss:
    """Called with a prepared part, it gives the sum of the losses of its samples: ()."""

    def __init__(self, compute: ComputeConfig, flat: FlatModel, *, loss: Loss) -> None:
        self._flat = flat
        self._is_autocast = compute.precision == "bfloat16"
        self._is_on_cpu = flat.weights.device.type == "cpu"
        self._is_channels_last = compute.channels_last or self._is_on_cpu
        self._has_static_shapes = compute.compile or compute.cuda_graphs
        self._most_labels = 0
        self._pixels: Tensor | None = None
        self._loss = partial(_without_spare_row, loss) if self._has_static_shapes else loss
        self._forward: Any = self._loss_of_pixels
        if compute.compile:
            self._forward = torch.compile(self._forward, dynamic=False)

    def prepare(self, part: Part) -> Part:
        """What to call this with for a part: the part, or one whose shapes hardly ever change, for
        what is made anew for every shape.
        """
        if not self._has_static_shapes:
            return part
        part = with_spare_row(part, num_labels=self._most_labels)
        self._most_labels = len(part.label_ids)
        return part

    def __call__(self, part: Part) -> Tensor:
        """The loss of a part that was prepared."""
        pixels = self._normalized(part.images).to(self._flat.weights.dtype)
        loss: Tensor = self._forward(pixels, *part[1:])
        return loss

    def _normalized(self, images: Tensor) -> Tensor:
        if not self._is_on_cpu:  # Memory costs nothing here, and a CUDA graph has its own.
            return normalize(images, out=None if self._is_channels_last else _planes_for(images))
        if self._pixels is not None and len(self._pixels) != len(images):
            self._pixels = None
        self._pixels = normalize(images, out=self._pixels)
        return self._pixels

    def _loss_of_pixels(
        self, pixels: Tensor, label_ids: Tensor, label_offsets: Tensor, sample_weights: Tensor
    ) -> Tensor:
        with self._precision():
            logits = self._flat.model(pixels)
            per_sample = self._loss(logits, label_ids, label_offsets)
        return (per_sample * sample_weights).sum()

    def _precision(self) -> AbstractContextManager[None]:
        if self._is_autocast:
            return torch.autocast(self._flat.weights.device.type, dtype=torch.bfloat16)
        return nullcontext()


def with_spare_row(part: Part, *, num_labels: int) -> Part:
    """The same part with at least so many labels: as many, as images, or a power of two. An image
    that does not exist has those that fill up.
    """
    has = len(part.label_ids)
    size = max(num_labels, len(part.images))
    if has > size:
        size = 1 << (has - 1).bit_length()
    label_ids = F.pad(part.label_ids, (0, size - has))
    label_offsets = F.pad(part.label_offsets, (0, 1), value=size)
    return part._replace(label_ids=label_ids, label_offsets=label_offsets)


def _without_spare_row(
    loss: Loss, logits: Tensor, label_ids: Tensor, label_offsets: Tensor
) -> Tensor:
    """The loss of the images of a part `with_spare_row`."""
    return loss(F.pad(logits, (0, 0, 0, 1)), label_ids, label_offsets)[:-1]


def _planes_for(images: Tensor) -> Tensor:
    """Memory for the pixels of (N, H, W, 3) images, one plane a channel."""
    num_images, height, width, channels = images.shape
    shape = (num_images, channels, height, width)
    return torch.empty(shape, dtype=torch.float32, device=images.device)
