"""Update: what steps of an optimizer read, and what they write besides the optimizer's slots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Parts:
    """A vector that lies in several places, which are only read."""

    values: Mapping[int, Tensor]
    """By where they begin: all of them, float32 or bfloat16, without gaps."""

    def whole(self, device: torch.device) -> Tensor:
        """(size,): a copy in one place."""
        return torch.cat([values.to(device) for _, values in sorted(self.values.items())])


@dataclass(frozen=True)
class Step:
    """One step of an optimizer."""

    gradients: Tensor | Parts
    """(size,): float32, which hold scratch afterwards, or bfloat16."""
    learning_rate: float
    scale: float = 1.0
    """Of the gradients, before anything else."""
    average_share: float = 1.0
    """By which the average moves towards the weights after this step, as in `optim.fold`."""

    def whole_gradients_on(self, device: torch.device) -> Tensor:
        """(size,): in one place there, if need be in a new one."""
        if isinstance(self.gradients, Parts):
            return self.gradients.whole(device)
        return self.gradients.to(device)


@dataclass(frozen=True)
class Update:
    """Steps of a range of weights, one after the other; all vectors are (size,), and apart from
    each other.
    """

    weights: Tensor
    """float32."""
    steps: Sequence[Step]
    weights_out: Tensor | None = None
    """float32; takes the new weights. None: `weights` does, which else are only read."""
    bfloat16_out: Tensor | None = None
    """bfloat16; takes the new weights too, rounded to nearest."""
    average: Tensor | None = None
    """float32; moves towards the weights after each step."""

    @property
    def new_weights(self) -> Tensor:
        """Where the new weights are after the steps."""
        return self.weights if self.weights_out is None else self.weights_out
