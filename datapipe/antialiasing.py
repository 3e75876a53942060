"""Pillow's antialiased bilinear scaling, as weighted sums of a matrix' rows in torch."""

from __future__ import annotations

import numpy as np
import torch
from torch.nn.functional import embedding_bag

from datapipe.fallback import Pixels


class Filter:
    """Pillow's antialiased bilinear filter: `side` outputs that divide [start, stop) of a line.

    `start` and `stop` of the filter are the inputs that it uses.
    """

    def __init__(self, size: int, start: float, stop: float, side: int) -> None:
        scale = (stop - start) / side
        width = max(scale, 1.0)
        centers = start + (np.arange(side) + 0.5) * scale
        first = np.maximum((centers - width + 0.5).astype(np.int64), 0)
        end = np.minimum((centers + width + 0.5).astype(np.int64), size)
        inputs = first[:, None] + np.arange((end - first).max())
        weights = np.maximum(1.0 - np.abs((inputs - centers[:, None] + 0.5) / width), 0.0)
        weights[inputs >= end[:, None]] = 0.0
        weights /= weights.sum(axis=1, keepdims=True)
        self.start, self.stop = int(first[0]), int(end[-1])
        self._inputs = torch.from_numpy(np.minimum(inputs, self.stop - 1) - self.start)
        self._weights = torch.from_numpy(weights.astype(np.float32))

    def apply(self, lines: Pixels) -> Pixels:
        """(inputs, N) -> (side, N)."""
        table = torch.from_numpy(lines.view(np.uint8)).to(torch.float32)
        sums = embedding_bag(self._inputs, table, mode="sum", per_sample_weights=self._weights)
        # numpy's conversion to bytes takes a sixth of torch's time
        return sums.add_(0.5).numpy().astype(np.uint8).view(np.int32)


def transposed(pixels: Pixels) -> Pixels:
    lines: Pixels = torch.from_numpy(pixels).T.contiguous().numpy()
    return lines
