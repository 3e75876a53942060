"""Rounding to bfloat16 with error feedback, and back, in one pass: `native/bfloat16.c`; with
torch's operations where it is missing or does not suit, to the same bits.

Without feedback `Tensor.copy_` rounds as fast.
"""

from __future__ import annotations

from torch import Tensor, bfloat16

from xdist import native_update


def narrow(
    values: Tensor, out: Tensor, *, residual: Tensor, num_threads: int | None = None
) -> None:
    """Round `values` (size,), float32, to nearest into `out` (size,), bfloat16.

    residual: (size,) float32, what the last rounding left. It is added before, and takes what this
    rounding leaves, so that in the end what was sent is the sum of what was to be sent; where the
    sum has no finite bfloat16, it stays without a finite value. num_threads: as in
    `Optimizer.step`.
    """
    if native_update.suits(values, residual) and native_update.suits(out, dtype=bfloat16):
        native_update.narrow(values, out, residual, num_threads=num_threads)
    else:
        residual.add_(values)
        out.copy_(residual)
        residual.sub_(out)


def widen(values: Tensor, out: Tensor, *, num_threads: int | None = None) -> None:
    """Copy `values` (size,), bfloat16, to `out` (size,), float32. num_threads: as in `narrow`."""
    if native_update.suits(values, dtype=bfloat16) and native_update.suits(out):
        native_update.widen(values, out, num_threads=num_threads)
    else:
        out.copy_(values)
