"""Vectors that a CPU updates in whole, on large pages where the system has such.

A processor knows where few pages are, and looks no further ahead than one; and each new page costs
a visit to the system. Linux gives large ones to who asks, which torch does not.
"""

from __future__ import annotations

import mmap

import numpy as np
import torch
from torch import Tensor

SMALLEST_BYTES = 4 << 20
"""Two large pages: below that there is nothing to gain."""


def empty_like(tensor: Tensor, *, device: torch.device | str | None = None) -> Tensor:
    """A tensor of the same shape and type, on its device if no other is given. Its values are
    whatever is there.
    """
    device = torch.device(device or tensor.device)
    if device.type != "cpu" or tensor.nbytes < SMALLEST_BYTES:
        return torch.empty_like(tensor, device=device)
    memory = mmap.mmap(-1, tensor.nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    # Never closed, as that would unmap it under its views: it ends with the last of these.
    flat = torch.as_tensor(np.frombuffer(memory, np.uint8))
    return flat.view(tensor.dtype).view(tensor.shape)


def copy(tensor: Tensor, *, device: torch.device | str | None = None) -> Tensor:
    """The same values, as in `empty_like`."""
    return empty_like(tensor, device=device).copy_(tensor)
