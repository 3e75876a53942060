"""Updates of weights on a CPU in one pass, and rounding to bfloat16: `native/` by ctypes.

It is installed beside the packages, where a compiler was present. `xdist.optim` and
`xdist.bfloat16` do the same operations with torch where it is missing, and for all other vectors:
to the same bits. The GIL is free meanwhile. num_threads: as in `run_in_chunks`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import pairwise

import torch
from torch import Tensor

from datapipe.native_library import load_library
from xdist.chunks import run_in_chunks
from xdist.update import Parts, Step, Update

MODULE = "xdist_update"
ABI_VERSION = 6


class _Step(ctypes.Structure):
    """`update_step` of native/update.c."""

    _fields_ = (
        ("gradients", ctypes.c_void_p),
        ("has_bfloat16_gradients", ctypes.c_int32),
        ("scale", ctypes.c_float),
        ("learning_rate", ctypes.c_float),
        ("average_share", ctypes.c_float),
    )


class _RangeUpdate(ctypes.Structure):
    """`range_update` of native/update.c."""

    _fields_ = (
        ("weights", ctypes.c_void_p),
        ("weights_out", ctypes.c_void_p),
        ("steps", ctypes.POINTER(_Step)),
        ("num_steps", ctypes.c_int64),
        ("momentum", ctypes.c_void_p),
        ("mean_square", ctypes.c_void_p),
        ("average", ctypes.c_void_p),
        ("bfloat16_out", ctypes.c_void_p),
        ("run_stops", ctypes.c_void_p),
        ("run_l2", ctypes.c_void_p),
        ("num_runs", ctypes.c_int64),
        ("momentum_decay", ctypes.c_float),
        ("mean_square_share", ctypes.c_float),
        ("epsilon", ctypes.c_float),
    )


@dataclass(frozen=True)
class Runs:
    """A vector by its runs of equal elements: those before `stops[i]`, from the run before on, are
    `values[i]`. It says in a few numbers which layers have an L2 penalty.
    """

    stops: Tensor
    """(num_runs,), int64."""
    values: Tensor
    """(num_runs,), float32."""

    @classmethod
    def of(cls, vector: Tensor) -> Runs:
        values, counts = torch.unique_consecutive(vector, return_counts=True)
        return cls(counts.cpu().cumsum(0), values.cpu().float())


def is_available() -> bool:
    return _library() is not None


def suits(*vectors: Tensor | None, dtype: torch.dtype = torch.float32) -> bool:
    """Whether the compiled code is there, and takes these as vectors of that type."""
    return is_available() and all(
        vector.device.type == "cpu" and vector.dtype == dtype and vector.is_contiguous()
        for vector in vectors
        if vector is not None
    )


def suits_update(update: Update, *slots: Tensor) -> bool:
    """Whether the compiled code is there, and takes all of these."""
    return (
        suits(update.weights, update.weights_out, update.average, *slots)
        and all(
            suits(*values) or suits(*values, dtype=torch.bfloat16)
            for values in (_parts(step).values() for step in update.steps)
        )
        and suits(update.bfloat16_out, dtype=torch.bfloat16)
    )


def sgd(
    update: Update,
    momentum: Tensor,
    l2: Runs,
    *,
    momentum_decay: float,
    num_threads: int | None = None,
) -> None:
    """As `optim.SGD.step`."""
    whole = _range_update(update, momentum, None, l2, momentum_decay)
    _run_update("update_sgd", whole, update.steps, len(momentum), num_threads)


def rmsprop(
    update: Update,
    momentum: Tensor,
    mean_square: Tensor,
    l2: Runs,
    *,
    momentum_decay: float,
    mean_square_share: float,
    epsilon: float,
    num_threads: int | None = None,
) -> None:
    """As `optim.RMSProp.step`; mean_square_share is 1 - decay."""
    whole = _range_update(update, momentum, mean_square, l2, momentum_decay)
    whole.mean_square_share = mean_square_share
    whole.epsilon = epsilon
    _run_update("update_rmsprop", whole, update.steps, len(momentum), num_threads)


def _range_update(
    update: Update, momentum: Tensor, mean_square: Tensor | None, l2: Runs, momentum_decay: float
) -> _RangeUpdate:
    """What both optimizers have, but the steps."""
    weights, new_weights, *others = _pointers(
        update.weights,
        update.new_weights,
        momentum,
        mean_square,
        update.average,
        update.bfloat16_out,
    )
    return _RangeUpdate(
        weights,
        new_weights,
        None,
        0,
        *others,
        *_pointers(l2.stops, l2.values),
        num_runs=len(l2.values),
        momentum_decay=momentum_decay,
    )


def _run_update(
    name: str, whole: _RangeUpdate, steps: Sequence[Step], size: int, num_threads: int | None
) -> None:
    """Make the steps of a range, by stretches in which each gradient lies in one place."""
    parts = [_parts(step) for step in steps]
    assert all(sum(map(len, values.values())) == size for values in parts)
    bounds = sorted({size}.union(*parts))
    stretches = [
        (start, stop, _of_stretch(whole, steps, start)) for start, stop in pairwise(bounds)
    ]
    function: Callable[..., None] = getattr(_library(), name)

    def run(start: int, stop: int) -> None:
        for first, last, update in stretches:
            if first < stop and start < last:
                function(update, max(start, first), min(stop, last))

    run_in_chunks(run, size, num_threads=num_threads)


def _parts(step: Step) -> Mapping[int, Tensor]:
    gradients = step.gradients
    return gradients.values if isinstance(gradients, Parts) else {0: gradients}


def _of_stretch(whole: _RangeUpdate, steps: Sequence[Step], start: int) -> _RangeUpdate:
    update = _RangeUpdate.from_buffer_copy(whole)
    update.steps = (_Step * len(steps))(*(_step(step, start) for step in steps))
    update.num_steps = len(steps)
    return update


def _step(step: Step, start: int) -> _Step:
    """As a stretch that begins at `start` has it: its gradients are where they would be if the
    whole vector lay there.
    """
    parts = _parts(step)
    place = max(place for place in parts if place <= start)
    values = parts[place]
    return _Step(
        values.data_ptr() - place * values.itemsize,
        values.dtype == torch.bfloat16,
        step.scale,
        step.learning_rate,
        step.average_share,
    )


def _pointers(*vectors: Tensor | None) -> tuple[int | None, ...]:
    """Where vectors of one size begin."""
    assert len({len(vector) for vector in vectors if vector is not None}) == 1
    return tuple(None if vector is None else vector.data_ptr() for vector in vectors)


def fold(average: Tensor, values: Tensor, *, share: float) -> None:
    """As `optim.fold`."""
    _run("update_fold", (*_pointers(average, values), share), len(average), None)


def copy(values: Tensor, out: Tensor) -> None:
    """Copy float32 values past the caches, to float32 or bfloat16, of one shape."""
    assert values.shape == out.shape
    name = "update_copy" if out.dtype == torch.float32 else "bfloat16_round"
    _run(name, (values.data_ptr(), out.data_ptr()), values.numel(), None)


def narrow(values: Tensor, out: Tensor, residual: Tensor, *, num_threads: int | None) -> None:
    """As `bfloat16.narrow`."""
    _run("bfloat16_narrow", _pointers(values, residual, out), len(values), num_threads)


def widen(values: Tensor, out: Tensor, *, num_threads: int | None) -> None:
    """As `bfloat16.widen`."""
    _run("bfloat16_widen", _pointers(values, out), len(values), num_threads)


def _run(name: str, arguments: tuple[object, ...], size: int, num_threads: int | None) -> None:
    """Call a function, whose last arguments are start and stop, on all of the vectors."""
    function: Callable[..., None] = getattr(_library(), name)
    run_in_chunks(partial(function, *arguments), size, num_threads=num_threads)


@cache
def _library() -> ctypes.CDLL | None:
    """The C functions, None where they are not built for this release."""
    library = load_library(MODULE, abi_function="update_abi", abi_version=ABI_VERSION)
    if library is not None:
        pointer, number, place = ctypes.c_void_p, ctypes.c_float, ctypes.c_int64
        library.update_sgd.argtypes = (ctypes.POINTER(_RangeUpdate), place, place)
        library.update_rmsprop.argtypes = (ctypes.POINTER(_RangeUpdate), place, place)
        library.update_fold.argtypes = (pointer, pointer, number, place, place)
        library.update_copy.argtypes = (pointer, pointer, place, place)
        library.bfloat16_round.argtypes = (pointer, pointer, place, place)
        library.bfloat16_widen.argtypes = (pointer, pointer, place, place)
        library.bfloat16_narrow.argtypes = (pointer, pointer, pointer, place, place)
    return library
