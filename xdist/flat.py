"""A model's parameters as one flat vector, and even ranges of it.

Optimizers, servers, averages and checkpoints work on the vector alone. Parameters and batch-norm
statistics stay where the model has them: they become views, so nothing is ever copied between the
model and the vector.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from xdist import native_update

LARGE = 1 << 16
"""Elements of a gradient that would not stay in the caches until it is sent."""


def even_ranges(size: int, num_ranges: int) -> tuple[tuple[int, int], ...]:
    """Cut [0, size) into contiguous (start, stop); the first ones are longer by one."""
    if num_ranges < 1:
        raise ValueError(f"num_ranges is {num_ranges}; allowed: at least 1")
    quotient, remainder = divmod(size, num_ranges)
    starts = [i * quotient + min(i, remainder) for i in range(num_ranges + 1)]
    return tuple(itertools.pairwise(starts))


@dataclass(frozen=True)
class Entry:
    """One tensor's place in a flat vector: [offset, offset + size)."""

    name: str
    shape: tuple[int, ...]
    offset: int

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def view(self, flat: Tensor) -> Tensor:
        """This tensor within `flat`, without a copy."""
        return flat[self.offset : self.offset + self.size].view(self.shape)

    def to_json(self) -> list[Any]:
        return [self.name, list(self.shape), self.offset]

    @classmethod
    def from_json(cls, value: list[Any]) -> Self:
        name, shape, offset = value
        return cls(name, tuple(shape), offset)


@dataclass(frozen=True)
class Layout:
    """Which tensors the two flat vectors hold, in order and without gaps."""

    parameters: tuple[Entry, ...]
    statistics: tuple[Entry, ...]
    statistics_momentum: float
    """Share of a batch's statistics in the running ones: the momentum of all batch norms."""

    @property
    def num_weights(self) -> int:
        return sum(entry.size for entry in self.parameters)

    def to_json(self) -> dict[str, Any]:
        """Plain values; a tensor is [name, shape, offset]."""
        return {
            "parameters": [entry.to_json() for entry in self.parameters],
            "statistics": [entry.to_json() for entry in self.statistics],
            "statistics_momentum": self.statistics_momentum,
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Self:
        """The layout that `to_json` wrote."""
        return cls(
            tuple(Entry.from_json(entry) for entry in value["parameters"]),
            tuple(Entry.from_json(entry) for entry in value["statistics"]),
            value["statistics_momentum"],
        )

    def l2_mask(self, l2_on: Literal["kernels", "all"]) -> Tensor:
        """(P,), float32: 1 where the L2 penalty applies. Kernels have two or more dimensions."""
        mask = torch.zeros(self.num_weights)
        for entry in self.parameters:
            if l2_on == "all" or len(entry.shape) > 1:
                entry.view(mask).fill_(1.0)
        return mask


class FlatModel:
    """A model whose parameters and batch-norm statistics are views into flat vectors.

    `weights`, `gradients`: (P,), in the order of `model.parameters()`. Backward leaves gradients
    where torch does, in `.grad`; a `Computation` brings them into the vector, which may be
    exchanged for another one between two batches, also of another type, if they are to be rounded.

    `statistics`: (S,), running mean and variance of every batch norm. The layers' momentum
    becomes 1, so after a training forward it holds the raw statistics of that batch (torch's: the
    variance is the unbiased one). Whoever owns the running values folds them in with
    `layout.statistics_momentum`, the momentum that the layers had, and for an evaluation copies the
    running values into `statistics`.

    All are float32, or float64 if the model is. It keeps its device; move it before this is built.
    `ValueError` for parameters of another or of different types and for batch norms of different
    momentum.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        norms = {
            name: module for name, module in model.named_modules() if isinstance(module, _BatchNorm)
        }
        parameters = dict(model.named_parameters())
        buffers = {
            f"{norm_name}.{name}" if norm_name else name: buffer
            for norm_name, norm in norms.items()
            for name, buffer in norm.named_buffers()
            if buffer.is_floating_point()
        }
        momentum = _take_momentum(norms.values())
        self.layout = Layout(_entries(parameters), _entries(buffers), momentum)
        self.weights = _move_into_one(parameters, self.layout.parameters)
        self.statistics = _move_into_one(buffers, self.layout.statistics)
        self.gradients = torch.zeros_like(self.weights)

    @property
    def gradients(self) -> Tensor:
        return self._gradients

    @gradients.setter
    def gradients(self, vector: Tensor) -> None:
        self._gradients = vector
        self._places: tuple[_Place, ...] = ()

    def collect(self, number: int, gradient: Tensor, *, adds: bool) -> None:
        """Bring a parameter's gradient to its place in `gradients`; adds: to what is there."""
        if not self._places:
            entries = self.layout.parameters
            self._places = tuple(_Place.of(entry.view(self._gradients)) for entry in entries)
        place = self._places[number]
        if adds:
            place.view.add_(gradient)
        elif place.is_for_native and native_update.suits(gradient):
            native_update.copy(gradient, place.view)
        else:
            place.view.copy_(gradient)


@dataclass(frozen=True)
class _Place:
    """Where a parameter's gradient goes."""

    view: Tensor
    is_for_native: bool
    """Whether it is so large that the compiled copy is faster, and suits that."""

    @classmethod
    def of(cls, view: Tensor) -> Self:
        suits = native_update.suits
        return cls(
            view, view.numel() >= LARGE and (suits(view) or suits(view, dtype=torch.bfloat16))
        )


def _take_momentum(norms: Collection[_BatchNorm]) -> float:
    """The one momentum of these layers, which is 1 from now on; 0 where there are none."""
    momenta = {norm.momentum for norm in norms}
    momentum = momenta.pop() if momenta else 0.0
    if momenta or momentum is None:
        others = sorted(map(str, momenta))
        raise ValueError(f"batch norms have momentum {momentum} and {others}; allowed: one number")
    for norm in norms:
        norm.momentum = 1.0
    return momentum


def _entries(tensors: Mapping[str, Tensor]) -> tuple[Entry, ...]:
    offsets = itertools.accumulate((tensor.numel() for tensor in tensors.values()), initial=0)
    return tuple(
        Entry(name, tuple(tensor.shape), offset)
        for (name, tensor), offset in zip(tensors.items(), offsets, strict=False)
    )


def _move_into_one(tensors: Mapping[str, Tensor], entries: tuple[Entry, ...]) -> Tensor:
    """Copy the tensors into one new vector and let each be a view of its part."""
    first = next(iter(tensors.values()), torch.empty(0))
    for name, tensor in tensors.items():
        if tensor.dtype != first.dtype or tensor.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"{name} is {tensor.dtype}; allowed: float32 or float64, the same for all"
            )
    flat = first.new_empty(sum(entry.size for entry in entries))
    for entry in entries:
        view = entry.view(flat)
        view.copy_(tensors[entry.name].detach())
        tensors[entry.name].data = view
    return flat
