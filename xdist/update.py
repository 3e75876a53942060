"""Update: what one step of an optimizer reads, and what it writes besides the optimizer's slots."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Update:
    """One update of a range of weights; all vectors are (size,), and apart from each other."""

    weights: Tensor
    """float32."""
    gradients: Tensor
    """float32, which hold scratch afterwards, or bfloat16."""
    learning_rate: float
    scale: float = 1.0
    """Of the gradients, before anything else."""
    weights_out: Tensor | None = None
    """float32; takes the new weights. None: `weights` does, which else are only read."""
    bfloat16_out: Tensor | None = None
    """bfloat16; takes the new weights too, rounded to nearest."""
    average: Tensor | None = None
    """float32; moves towards the new weights by `average_share`, as in `optim.fold`."""
    average_share: float = 1.0

    @property
    def new_weights(self) -> Tensor:
        """Where the new weights are after the step."""
        return self.weights if self.weights_out is None else self.weights_out
