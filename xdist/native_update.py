"""Updates of float32 vectors on a CPU, each in one pass: `native/update.c` by ctypes.

It is installed beside the packages, where a compiler was present. `xdist.optim` does the same
operations one after the other where it is missing, and for all other vectors: to the same bits.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from datapipe.native_library import load_library
from xdist.chunks import run_in_chunks

MODULE = "xdist_update"
ABI_VERSION = 1


def is_available() -> bool:
    return _library() is not None


def suits(*vectors: Tensor | None) -> bool:
    """Whether the compiled code is there, and takes these."""
    return is_available() and all(
        vector.device.type == "cpu" and vector.dtype == torch.float32 and vector.is_contiguous()
        for vector in vectors
        if vector is not None
    )


def sgd(
    weights: Tensor,
    gradients: Tensor,
    momentum: Tensor,
    l2_factors: Tensor | None,
    *,
    learning_rate: float,
    momentum_decay: float,
) -> None:
    """As `optim.SGD.step`."""
    numbers = (ctypes.c_float(learning_rate), ctypes.c_float(momentum_decay))
    _run("update_sgd", (weights, gradients, momentum, l2_factors), numbers)


def rmsprop(
    weights: Tensor,
    gradients: Tensor,
    momentum: Tensor,
    mean_square: Tensor,
    l2_factors: Tensor | None,
    *,
    learning_rate: float,
    momentum_decay: float,
    mean_square_share: float,
    epsilon: float,
) -> None:
    """As `optim.RMSProp.step`; mean_square_share is 1 - decay."""
    values = (learning_rate, momentum_decay, mean_square_share, epsilon)
    vectors = (weights, gradients, momentum, mean_square, l2_factors)
    _run("update_rmsprop", vectors, tuple(map(ctypes.c_float, values)))


def fold(average: Tensor, values: Tensor, *, share: float) -> None:
    """As `optim.fold`."""
    _run("update_fold", (average, values), (ctypes.c_float(share),))


def _run(
    name: str, vectors: tuple[Tensor | None, ...], numbers: tuple[ctypes.c_float, ...]
) -> None:
    """Call a function on all of the vectors, in as many threads as torch has."""
    function: Callable[..., None] = getattr(_library(), name)

    def run_chunk(start: int, stop: int) -> None:
        pointers = [
            None if vector is None else ctypes.c_void_p(vector.data_ptr() + 4 * start)
            for vector in vectors
        ]
        function(*pointers, ctypes.c_size_t(stop - start), *numbers)

    run_in_chunks(run_chunk, max(vector.numel() for vector in vectors if vector is not None))


@cache
def _library() -> ctypes.CDLL | None:
    """The C functions, None where they are not built for this release."""
    return load_library(MODULE, abi_function="update_abi", abi_version=ABI_VERSION)
