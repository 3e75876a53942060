"""What all ranks make alike of what they have summed: arithmetic that no GPU is waited for."""

from __future__ import annotations

import torch
from torch import Tensor

from xdist.computation import BatchSums
from xdist.flat import FlatModel
from xdist.state import RangeState, StatisticsState
from xdist.update import Step


def scale(gradients: Tensor, factor: Tensor, *, clip_norm: float | None) -> None:
    """Multiply by `factor`, (), in place, and then down to that norm, if it is larger."""
    if clip_norm is not None:
        norm = torch.linalg.vector_norm(gradients) * factor
        factor = factor * (clip_norm / norm.clamp(min=clip_norm))
    if factor.device.type != "cpu" or factor != 1:
        gradients.mul_(factor)


def mean_statistics(sums: BatchSums, *, otherwise: Tensor) -> Tensor:
    """Batch-norm statistics, (S,), as the mean over all parts that have samples, if any has."""
    mean = sums.statistics / sums.num_parts.clamp(min=1)
    return torch.where(sums.num_parts > 0, mean, otherwise)


def apply_summed(
    flat: FlatModel,
    sums: BatchSums,
    state: RangeState,
    statistics: StatisticsState,
    *,
    divisor: float,
    clip_norm: float | None,
    learning_rate: float,
    average_decay: float,
) -> None:
    """The update that all ranks make, once gradients and sums are those of all. divisor: of the
    loss whose gradients were summed.
    """
    factor = divisor / sums.num_samples.clamp(min=1)
    scale(flat.gradients, factor, clip_norm=clip_norm)
    state.apply(Step(flat.gradients, learning_rate, average_share=1 - average_decay))
    mean = mean_statistics(sums, otherwise=statistics.running)
    statistics.apply(mean, average_decay=average_decay)


class StopVotes:
    """Reads whether any rank wants to stop, alike on all ranks, and without waiting for a GPU:
    there the votes of a step count after the next one.
    """

    def __init__(self) -> None:
        self._copied: tuple[Tensor, torch.cuda.Event] | None = None

    def read(self, votes: Tensor) -> bool:
        if votes.device.type == "cpu":
            return votes.item() > 0
        before = self._copied
        copy = torch.empty((), dtype=votes.dtype, pin_memory=True)
        copy.copy_(votes, non_blocking=True)
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        self._copied = (copy, event)
        if before is None:
            return False
        before[1].synchronize()
        return before[0].item() > 0
