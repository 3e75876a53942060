"""The wire: what gradients and weights are between a worker and its servers.

Ray sends numpy arrays without a copy of its own, and numpy has no bfloat16: its bits go as uint16.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xdist.servers_config import ServersConfig

WireVector = NDArray[np.float32] | NDArray[np.uint16]
"""(size,): float32, or the bits of bfloat16."""


def dtype_of(config: ServersConfig) -> torch.dtype:
    """What gradients and weights are sent as."""
    return torch.bfloat16 if config.wire == "bfloat16" else torch.float32


def as_vector(tensor: Tensor) -> WireVector:
    """The same memory. tensor: (size,), float32 or bfloat16, on the host."""
    vector: WireVector = (tensor.view(torch.uint16) if tensor.itemsize == 2 else tensor).numpy()
    return vector


def as_tensor(vector: NDArray[Any]) -> Tensor:
    """The same memory, bfloat16 if it is uint16. Only to be read where the array is."""
    tensor = torch.from_numpy(np.asarray(_Lent(vector)))
    return tensor.view(torch.bfloat16) if vector.dtype == np.uint16 else tensor


class _Lent:
    """An array that calls itself writable: torch warns of every other one."""

    def __init__(self, array: NDArray[Any]) -> None:
        self._array = array

    @property
    def __array_interface__(self) -> dict[str, Any]:
        return {**self._array.__array_interface__, "data": (self._array.ctypes.data, False)}
