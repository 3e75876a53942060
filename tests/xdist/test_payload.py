"""Files of safetensors that are made in memory."""

from __future__ import annotations

import pytest
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from xdist.payload import Payload

TENSORS = {
    "weights": torch.randn(11),
    "average": torch.randn(2, 3, dtype=torch.float64),
    "wire": torch.randn(5).bfloat16(),
    "none": torch.empty(0),
}


def loaded(payload: Payload) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = safetensors.torch.load(bytes(payload.content))
    return tensors


def test_the_library_reads_what_was_filled_in_last() -> None:
    payload = Payload.of(TENSORS)
    assert loaded(payload).keys() == TENSORS.keys()
    assert all(torch.equal(loaded(payload)[name], TENSORS[name]) for name in TENSORS)
    payload.fill({name: tensor + 1 for name, tensor in TENSORS.items()})
    assert all(torch.equal(loaded(payload)[name], TENSORS[name] + 1) for name in TENSORS)


def test_a_part_of_a_vector_is_copied_out_of_it() -> None:
    whole = torch.arange(10.0)
    payload = Payload.of({"weights": whole[3:7]})
    whole.zero_()
    assert loaded(payload)["weights"].tolist() == [3, 4, 5, 6]


@pytest.mark.parametrize(
    "others",
    [
        {"weights": torch.randn(12)},
        {"average": torch.randn(11)},
        {"weights": torch.randn(11).double()},
    ],
)
def test_it_fits_tensors_of_its_names_shapes_and_types_alone(others: dict[str, Tensor]) -> None:
    payload = Payload({"weights": torch.randn(11)})
    assert payload.fits({"weights": torch.randn(11)})
    assert not payload.fits(others)
