"""Memory is used again when its last holder is gone, and never before."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from datapipe.buffers import ImageBuffers


def test_memory_that_nobody_holds_is_used_again() -> None:
    buffers = ImageBuffers(pin=False)
    first, second = buffers.take(2, 8), buffers.take(2, 8)
    assert (first.shape, first.dtype) == ((2, 8, 8, 3), torch.uint8)
    places = {first.data_ptr(), second.data_ptr()}
    assert len(places) == 2
    del first, second
    again = [buffers.take(2, 8), buffers.take(2, 8), buffers.take(2, 8)]
    assert len({tensor.data_ptr() for tensor in again}) == 3
    assert places < {tensor.data_ptr() for tensor in again}


@pytest.mark.parametrize(
    "part",
    [
        lambda tensor: tensor[1],
        lambda tensor: tensor.permute(0, 3, 1, 2),
        lambda tensor: tensor.numpy(),
        lambda tensor: tensor.untyped_storage(),
    ],
)
def test_whoever_holds_a_part_holds_the_memory(part: Callable[[Tensor], Any]) -> None:
    buffers = ImageBuffers(pin=False)
    tensor = buffers.take(2, 8)
    place = tensor.data_ptr()
    held = part(tensor)
    del tensor
    assert buffers.take(2, 8).data_ptr() != place
    del held
    assert place in {taken.data_ptr() for taken in [buffers.take(2, 8), buffers.take(2, 8)]}


def test_no_images_need_no_memory() -> None:
    assert ImageBuffers(pin=False).take(0, 8).shape == (0, 8, 8, 3)
