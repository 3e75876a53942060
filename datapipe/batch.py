"""Batch: images and labels of one training step, as torch tensors of a static shape."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from datapipe.counters import ReadCounters
from datapipe.errors import CorruptSample
from datapipe.position import Span


@dataclass(frozen=True, eq=False)
class Batch:
    """Rows; those with sample_weight 0 only fill a place: not in the loss, not in the measures."""

    images: Tensor
    """(N, S, S, 3), uint8, RGB."""
    label_ids: Tensor
    """(number of labels,), int64: the labels of all samples, one after the other."""
    label_offsets: Tensor
    """(N + 1,), int64: sample i has label_ids[label_offsets[i]:label_offsets[i + 1]]."""
    sample_weights: Tensor
    """(N,), float32: 1, or 0 for a place without a sample, which repeats another sample."""
    sample_ids: Tensor
    """(N,), int64: each sample's number in the index."""
    spans: tuple[Span, ...]
    """The places of the epoch's sequence that this batch does, corrupt samples included."""
    segment_sizes: tuple[int, ...]
    """Rows of each segment (lane), in order; their sum is N."""
    num_samples: int
    """Rows with sample_weight 1."""
    corrupt: tuple[CorruptSample, ...]
    """The samples of these spans that could not be used."""
    read: ReadCounters = field(default_factory=ReadCounters)
    """What its stream has read since the batch before; ahead of this batch too."""

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with its tensors on that device."""
        return replace(
            self,
            images=self.images.to(device, non_blocking=True),
            label_ids=self.label_ids.to(device, non_blocking=True),
            label_offsets=self.label_offsets.to(device, non_blocking=True),
            sample_weights=self.sample_weights.to(device, non_blocking=True),
            sample_ids=self.sample_ids.to(device, non_blocking=True),
        )


def normalize(images: Tensor, *, out: Tensor | None = None) -> Tensor:
    """(N, H, W, 3) uint8 -> (N, 3, H, W) float32 in [-1, 1], in channels-last memory format.

    out: an earlier result for images of this shape that nobody needs any more. Its memory is used
    again, as fresh pages cost four times what the arithmetic does.
    """
    pixels = images.permute(0, 3, 1, 2)
    if out is None:
        out = torch.empty_like(pixels, dtype=torch.float32)
    return out.copy_(pixels).div_(127.5).sub_(1.0)
