"""ImageBuffers: memory for batches of images, used again as soon as nobody holds a batch.

Fresh memory costs a page fault every 4 KiB, a twentieth of what decoding into it does.
"""

from __future__ import annotations

import ctypes
import weakref
from collections import defaultdict, deque
from typing import Any

import numpy as np
import torch
from torch import Tensor


class ImageBuffers:
    """Hands out uint8 tensors whose content is whatever was there before.

    pin: in page-locked memory, from which copies to a GPU run beside the host; torch itself uses
    that again, once such a copy has ended. May be used by several threads.
    """

    def __init__(self, *, pin: bool) -> None:
        self._pin = pin
        self._free: defaultdict[int, deque[Any]] = defaultdict(deque)

    def take(self, num_images: int, side: int) -> Tensor:
        """(num_images, side, side, 3), uint8."""
        shape = (num_images, side, side, 3)
        if self._pin:
            return torch.empty(shape, dtype=torch.uint8, pin_memory=True)
        size = num_images * side * side * 3
        free = self._free[size]
        try:
            memory = free.pop()
        except IndexError:
            memory = np.empty(size, np.uint8)
        # The tensor refers to this array, and to nothing else that could outlive it.
        lent = (ctypes.c_uint8 * size).from_buffer(memory)
        weakref.finalize(lent, free.append, memory).atexit = False
        return torch.from_numpy(np.frombuffer(memoryview(lent), np.uint8).reshape(shape))
