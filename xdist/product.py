"""Product: a part of a linear layer's gradient, as the factors that it is the product of.

The gradient of a weight (outputs, inputs) is the sum over the batch of output gradient times input.
For a batch of 32 and the 69.6 million weights of 17,000 labels after 4,096 units these two are a
hundredth of it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from xdist.wire import WireVector, as_tensor, as_vector


@dataclass(frozen=True)
class Product:
    """Elements [start, stop) of the product, row after row."""

    output_gradients: WireVector
    """(N, rows): those of the rows that are needed."""
    inputs: WireVector
    """(N, columns)."""
    start: int
    stop: int

    def values(self) -> WireVector:
        """(stop - start,), in the type of the factors; it is summed in float32."""
        gradients, inputs = as_tensor(self.output_gradients), as_tensor(self.inputs)
        whole = torch.mm(gradients.float().t(), inputs.float())
        return as_vector(whole.view(-1)[self.start : self.stop].to(gradients.dtype))
