"""FusedUpdate: an optimizer's step and the weights' average as one compiled pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from xdist.optim import Optimizer, fold_block
from xdist.update import Step


class FusedUpdate:
    """Updates one range of weights, reading and writing each vector once.

    It compiles the operations of `optimizer.step` and `fold` themselves. On a CPU the numbers are
    the same to the bit; on a GPU they are within rounding, as its compiler makes one operation of a
    product and a sum. Learning rate and decay are inputs, so that another value compiles nothing
    anew.
    """

    def __init__(self, optimizer: Optimizer, weights: Tensor, average: Tensor | None) -> None:
        self._optimizer = optimizer
        self._weights = weights
        self._average = average
        self._update: Any = torch.compile(self._whole_update, dynamic=False)

    def __call__(self, step: Step) -> None:
        """One of `RangeState.apply`; its gradients may be elsewhere."""
        weights = self._weights
        gradients = step.whole_gradients_on(weights.device).to(weights.dtype)
        numbers = step.learning_rate, step.average_share, step.scale
        self._update(gradients, *(weights.new_full((), number) for number in numbers))

    def _whole_update(
        self, gradients: Tensor, learning_rate: Tensor, share: Tensor, scale: Tensor
    ) -> None:
        weights, whole = self._weights, slice(None)
        scratch = torch.empty_like(weights)
        gradients.mul_(scale)  # 1 changes no bit.
        self._optimizer.step_block(whole, weights, gradients, scratch, learning_rate)
        if self._average is not None:
            fold_block(self._average, weights, scratch, share)
