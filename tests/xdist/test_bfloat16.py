"""Rounding to bfloat16 is torch's to the bit, compiled or not, and what it leaves is not lost."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.xdist.updates import same_bits, vectors
from xdist import bfloat16
from xdist.chunks import CHUNK

properties = settings(derandomize=True, deadline=None, max_examples=60)


def halves(size: int) -> Tensor:
    return torch.zeros(size, dtype=torch.bfloat16)


def test_every_way_to_round_is_torchs() -> None:
    """All upper halves, with lower ones around the tie."""
    upper = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32) << 16
    for lower in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF):
        values = (upper | lower).view(torch.float32)
        out = halves(len(values))
        bfloat16.narrow(values, out, residual=torch.zeros(len(values)))
        assert same_bits(out, (values + 0.0).to(torch.bfloat16))


@pytest.mark.parametrize("offset", range(5))
def test_every_value_is_widened(offset: int) -> None:
    values = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int16).view(torch.bfloat16)[offset:]
    out = torch.zeros(len(values) + offset)[offset:]
    bfloat16.widen(values, out)
    assert same_bits(out, values.float())


@properties
@given(st.sampled_from([0, 1, 15, 16, 17, 33]) | st.integers(0, 300), st.integers(0, 3))
def test_what_rounding_left_is_added_to_the_next(size: int, offset: int) -> None:
    drawn = vectors(size + offset, seed=size, has_specials=True)
    residual = next(drawn)[offset:]
    expected, out = residual.clone(), halves(size + offset)[offset:]
    for _ in range(3):
        values = next(drawn)[offset:]
        bfloat16.narrow(values, out, residual=residual)
        assert same_bits(out, (values + expected).to(torch.bfloat16))
        expected = values + expected - out.float()
        assert same_bits(residual, expected)


def test_what_is_sent_in_the_end_is_what_was_to_be_sent() -> None:
    values, residual, out = torch.full((20,), 1.001), torch.zeros(20), halves(20)
    total = torch.zeros(20)
    for _ in range(1000):
        bfloat16.narrow(values, out, residual=residual)
        total += out
    # Without feedback it is 1000, as 1 is next to 1.001; less than half a step of 2^-7 is left.
    torch.testing.assert_close(total, torch.full((20,), 1001.0), atol=0.004, rtol=0)


@pytest.mark.parametrize("num_threads", [None, 3])
def test_several_threads_change_nothing(num_threads: int | None) -> None:
    drawn = vectors(2 * CHUNK + 5, seed=0)
    values, residual, out = next(drawn), next(drawn), halves(2 * CHUNK + 5)
    expected = (values + residual).to(torch.bfloat16)
    bfloat16.narrow(values, out, residual=residual, num_threads=num_threads)
    assert torch.equal(out, expected)


def test_other_vectors_are_left_to_torch() -> None:
    drawn = vectors(20, seed=0)
    values, residual, out = next(drawn), next(drawn).double(), halves(40)[::2]
    expected = (values + residual).to(torch.bfloat16)
    bfloat16.narrow(values, out, residual=residual)
    assert torch.equal(out, expected)
