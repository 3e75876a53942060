"""Copies that begin and end anywhere."""

from __future__ import annotations

import pytest
import torch

from xdist import host_copy


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("first", [0, 1, 16])
@pytest.mark.parametrize("size", [0, 1, 100_000])
def test_a_copy_has_the_values_and_touches_nothing_else(
    dtype: torch.dtype, first: int, size: int
) -> None:
    values = torch.randn(size + 3)[3:]
    whole = torch.zeros(size + 20, dtype=dtype)
    out = whole[first : first + size]
    assert host_copy.copy(values, out) is out
    assert torch.equal(out, values.to(dtype))
    assert not whole[:first].any()
    assert not whole[first + size :].any()
