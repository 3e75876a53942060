"""Factors: what the gradients of linear layers are made of, as one backward leaves it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from xdist import wire
from xdist.flat import FlatModel
from xdist.product import Product

LARGEST_SHARE = 0.5
"""Of the bytes of a gradient that its factors may have. A server pays for the rest with a matrix
product.
"""


@dataclass
class LinearLayer:
    """A layer whose gradient is a product, and its factors, part after part of a batch."""

    start: int
    """Of its weight in the flat vector."""
    num_rows: int
    num_columns: int
    factors: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    """Output gradients (n, rows) and inputs (n, columns)."""

    @property
    def stop(self) -> int:
        return self.start + self.num_rows * self.num_columns


class Factors:
    """The linear layers of a model that share their weights with no other layer, and the factors of
    their last gradients.
    """

    def __init__(self, flat: FlatModel, dtype: torch.dtype) -> None:
        """dtype: what is sent."""
        self._dtype = dtype
        self.is_wanted = False
        """Whether they are kept, from the next forward on."""
        places = {entry.name: entry.offset for entry in flat.layout.parameters}
        modules = list(flat.model.modules())
        num_owners = Counter(id(each) for module in modules for each in module._parameters.values())
        self.layers: list[LinearLayer] = []
        for name, module in flat.model.named_modules():
            if isinstance(module, nn.Linear) and num_owners[id(module.weight)] == 1:
                place = places[f"{name}.weight" if name else "weight"]
                layer = LinearLayer(place, module.out_features, module.in_features)
                self.layers.append(layer)
                module.register_forward_hook(partial(self._keep, layer))

    def _keep(self, layer: LinearLayer, _module: nn.Module, inputs: Any, output: Any) -> None:
        if self.is_wanted and output.requires_grad:
            columns = inputs[0].detach().reshape(-1, layer.num_columns)

            def keep(gradient: Tensor) -> None:
                layer.factors.append((gradient.detach().reshape(-1, layer.num_rows), columns))

            output.register_hook(keep)

    def clear(self) -> None:
        """Forget the factors of the gradient that was sent."""
        for layer in self.layers:
            layer.factors = []

    def split(self, start: int, stop: int) -> Iterator[tuple[int, int, Product | None]]:
        """Weights [start, stop) in parts (start, stop, product): with a product where that is much
        smaller than the gradient itself.
        """
        for layer in self.layers:
            first, last = max(start, layer.start), min(stop, layer.stop)
            product = self._product(layer, first, last)
            if product is None:
                continue
            if start < first:
                yield start, first, None
            yield first, last, product
            start = last
        if start < stop:
            yield start, stop, None

    def _product(self, layer: LinearLayer, first: int, last: int) -> Product | None:
        """The weights [first, last) of a layer; None where they are better sent as they are."""
        if first >= last or not layer.factors:
            return None
        width = layer.num_columns
        first_row, start = divmod(first - layer.start, width)
        last_row = -(-(last - layer.start) // width)
        num_samples = sum(len(inputs) for _, inputs in layer.factors)
        num_sent = num_samples * (last_row - first_row + width)
        if num_sent > LARGEST_SHARE * (last - first):
            return None
        rows = self._sent([gradients[:, first_row:last_row] for gradients, _ in layer.factors])
        columns = self._sent([inputs for _, inputs in layer.factors])
        return Product(rows, columns, start, start + last - first)

    def _sent(self, parts: list[Tensor]) -> wire.WireVector:
        return wire.as_vector(torch.cat(parts).to("cpu", self._dtype).contiguous())
