"""Updates of weights for the tests: vectors, optimizers, and when results are the same."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from xdist.optim import SGD, RMSProp

SPECIALS = (0.0, -0.0, 1e-42, -1e-45, 3e38, float("inf"), -float("inf"), float("nan"))


def make_sgd(mask: Tensor, l2: float) -> SGD:
    return SGD(momentum=0.9, l2=l2, l2_mask=mask)


def make_rmsprop(mask: Tensor, l2: float) -> RMSProp:
    return RMSProp(momentum=0.9, decay=0.93, epsilon=1.0, l2=l2, l2_mask=mask)


def vectors(size: int, *, seed: int, has_specials: bool = False) -> Iterator[Tensor]:
    """Numbers of any magnitude; has_specials: some are not finite, or denormal."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        exponents = torch.randint(-12, 8, (size,), generator=generator)
        vector = torch.randn(size, generator=generator) * torch.exp2(exponents)
        if has_specials:
            drawn = torch.randint(0, 10 * len(SPECIALS), (size,), generator=generator)
            for number, special in enumerate(SPECIALS):
                vector[drawn == number] = special
        yield vector


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether the elements are NaN in the same places, and otherwise equal, also in sign."""
    bits = torch.int16 if one.dtype == torch.bfloat16 else torch.int32
    numbers = ~one.isnan()
    return torch.equal(one.isnan(), other.isnan()) and torch.equal(
        one.view(bits)[numbers], other.view(bits)[numbers]
    )
