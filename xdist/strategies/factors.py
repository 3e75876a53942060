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
from xdist.config import TrainConfig
from xdist.flat import FlatModel
from xdist.product import Product

PRODUCT_FLOPS = 22e9
"""Floating-point operations a second of a server's thread, when it multiplies factors (measured by
`tests.benchmarks.factors` on an Intel Xeon with AVX-512; with AVX2 it is about half).
"""


def flop_per_byte(config: TrainConfig) -> float:
    """What a server multiplies in the time in which a byte comes to it: factors are worth no more.
    One that reserves no CPUs is taken to have one.
    """
    num_threads = max(1, int(config.cluster.cpus_per_server))
    return num_threads * PRODUCT_FLOPS / (config.servers.link_gbits * 1e9 / 8)


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

    def __init__(self, flat: FlatModel, dtype: torch.dtype, *, flop_per_byte: float) -> None:
        """dtype: what is sent. flop_per_byte: that a byte is worth which is not sent."""
        self._dtype = dtype
        self._flop_per_byte = flop_per_byte
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
        """Weights [start, stop) in parts (start, stop, product): with a product where that comes to
        the gradient sooner than its bytes would.
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
        num_rows = last_row - first_row
        num_spared = last - first - num_samples * (num_rows + width)
        flop = 2 * num_samples * num_rows * width
        if flop > self._flop_per_byte * self._dtype.itemsize * num_spared:
            return None
        rows = self._sent([gradients[:, first_row:last_row] for gradients, _ in layer.factors])
        columns = self._sent([inputs for _, inputs in layer.factors])
        return Product(rows, columns, start, start + last - first)

    def _sent(self, parts: list[Tensor]) -> wire.WireVector:
        return wire.as_vector(torch.cat(parts).to("cpu", self._dtype).contiguous())
