"""Pillow's antialiased bilinear scaling with torch, close to its bits.

Along a line of pixels: weighted sums of the rows of a matrix (`embedding_bag`), rounded to 8 bits.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import embedding_bag

from datapipe.fallback import Pixels


@dataclass(frozen=True, eq=False)
class Filter:
    """Outputs along a line as weighted sums of its inputs."""

    start: int
    stop: int
    """The inputs that are used."""
    inputs: Tensor
    """(outputs, most inputs of one), counted from `start`."""
    weights: Tensor

    def apply(self, lines: Pixels) -> Pixels:
        """(inputs, N) -> (side, N)."""
        table = torch.from_numpy(lines.view(np.uint8)).to(torch.float32)
        sums = embedding_bag(self.inputs, table, mode="sum", per_sample_weights=self.weights)
        # numpy's conversion to bytes takes a sixth of torch's time
        return sums.add_(0.5).numpy().astype(np.uint8).view(np.int32)


def filters(
    sizes: tuple[int, int], edges: NDArray[np.float32], *, side: int
) -> tuple[Filter, Filter]:
    """Pillow's antialiased bilinear filters (its Resample.c) for `side` outputs along each axis.

    edges: of the box, (2, 2), start and stop by axis.
    """
    start = edges[:, :1].astype(np.float64)
    scale = (edges[:, 1:] - edges[:, :1]).astype(np.float64) / side  # as Pillow, of floats
    width = np.maximum(scale, 1.0)
    centers = start + (np.arange(side) + 0.5) * scale
    first = np.maximum((centers - width + 0.5).astype(np.int64), 0)
    end = np.minimum((centers + width + 0.5).astype(np.int64), np.array(sizes)[:, None])
    inputs = first[:, :, None] + np.arange((end - first).max())
    weights = 1.0 - np.abs((inputs + 0.5 - centers[:, :, None]) / width[:, :, None])
    weights[(inputs >= end[:, :, None]) | (weights < 0.0)] = 0.0
    weights /= weights.sum(axis=2, keepdims=True)
    used = first[:, :1, None]
    tables = torch.from_numpy(np.minimum(inputs, end[:, -1:, None] - 1) - used)
    factors = torch.from_numpy(weights.astype(np.float32))
    return (
        Filter(int(first[0, 0]), int(end[0, -1]), tables[0], factors[0]),
        Filter(int(first[1, 0]), int(end[1, -1]), tables[1], factors[1]),
    )


def transposed(pixels: Pixels) -> Pixels:
    lines: Pixels = torch.from_numpy(pixels).T.contiguous().numpy()
    return lines


def work_alone(num_threads: int) -> None:
    """Let torch use no other threads for what the calling one asks of it, and leave `num_threads`
    to all others.

    A team for each thread that decodes would cost several times what it does for so little work.
    What torch is told holds for the thread that tells it, and as a default for those to come, which
    a thread of that kind therefore puts back.
    """
    torch.get_num_threads()  # or the default would be taken over later, at the first operation
    torch.set_num_threads(1)
    other = threading.Thread(target=torch.set_num_threads, args=(num_threads,))
    other.start()
    other.join()
