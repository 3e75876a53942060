"""The compiled pass makes the bits of torch's operations."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from xdist import native_update, optim
from xdist.chunks import CHUNK
from xdist.optim import SGD, Optimizer, RMSProp

pytestmark = pytest.mark.skipif(
    not native_update.is_available(),
    reason="native/update.c is not built; pip install . builds it where there is a compiler",
)
properties = settings(derandomize=True, deadline=None, max_examples=40)


def make_sgd(mask: Tensor, l2: float) -> SGD:
    return SGD(momentum=0.9, l2=l2, l2_mask=mask)


def make_rmsprop(mask: Tensor, l2: float) -> RMSProp:
    return RMSProp(momentum=0.9, decay=0.93, epsilon=1.0, l2=l2, l2_mask=mask)


def vectors(size: int, seed: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        exponents = torch.randint(-12, 8, (size,), generator=generator)
        yield torch.randn(size, generator=generator) * torch.exp2(exponents)


def by_torch(optimizer: Optimizer, weights: Tensor, gradients: Tensor, rate: float) -> None:
    scratch = torch.empty_like(weights)
    optimizer.step_block(slice(None), weights, gradients, scratch, rate)


@pytest.mark.parametrize("make", [make_sgd, make_rmsprop])
@properties
@given(st.integers(1, 300), st.integers(0, 5), st.sampled_from([0.0, 1e-5, 0.3]))
def test_steps_are_equal_to_the_bit(
    make: Callable[[Tensor, float], Any], size: int, offset: int, l2: float
) -> None:
    drawn = vectors(size + offset, seed=size)
    mask = (next(drawn) > 0).float()[offset:]  # Ranges begin anywhere in a vector.
    ours, theirs = make(mask, l2), make(mask, l2)
    weights = next(drawn)
    other = weights.clone()[offset:]
    weights = weights[offset:]
    for step in range(3):
        gradients, rate = next(drawn)[offset:], 0.045 * 0.94**step
        by_torch(theirs, other, gradients.clone(), rate)
        ours.step(weights, gradients, learning_rate=rate)
        assert torch.equal(weights, other)
    for name, slot in ours.slots.items():
        assert torch.equal(slot, theirs.slots[name])


@properties
@given(st.integers(1, 300), st.floats(0, 1))
def test_averages_are_equal_to_the_bit(size: int, share: float) -> None:
    drawn = vectors(size, seed=size)
    average, values = next(drawn), next(drawn)
    other = average.clone()
    optim.fold_block(other, values, torch.empty_like(other), share)
    optim.fold(average, values, share=share)
    assert torch.equal(average, other)


def test_several_threads_change_nothing() -> None:
    drawn = vectors(3 * CHUNK + 5, seed=0)
    weights, gradients, mask = next(drawn), next(drawn), (next(drawn) > 0).float()
    other = weights.clone()
    by_torch(make_sgd(mask, 0.1), other, gradients.clone(), 0.1)
    num_threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        make_sgd(mask, 0.1).step(weights, gradients, learning_rate=0.1)
    finally:
        torch.set_num_threads(num_threads)
    assert torch.equal(weights, other)


def test_other_vectors_are_left_to_torch() -> None:
    vector = torch.zeros(6)
    assert native_update.suits(vector, None)
    assert not native_update.suits(vector, vector.double())
    assert not native_update.suits(vector[::2])
    weights = torch.ones(4, dtype=torch.float64)
    make_sgd(torch.ones(4, dtype=torch.float64), 0.0).step(
        weights, torch.ones(4, dtype=torch.float64), learning_rate=0.5
    )
    assert weights.tolist() == [0.5] * 4
