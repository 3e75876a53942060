"""Payload: a safetensors file in memory, whose tensors are filled in again and again.

`safetensors.torch.save` copies everything twice, onto pages that are touched for the first time,
and lets no other thread of the program run meanwhile. To fill a payload is one copy, by as many
threads as torch has, and to write it is none.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping

import torch
from torch import Tensor

from xdist import host_copy, large_pages

NAMES_OF_TYPES = {torch.float32: "F32", torch.float64: "F64", torch.bfloat16: "BF16"}
"""As safetensors has them, of all that a training state may be made of."""
LENGTH_BYTES = 8
ALIGNMENT = 64
"""Of the first tensor, in bytes: a line of a cache. The header is filled up with blanks, as
safetensors fills it, to multiples of 8.
"""


class Payload:
    """For tensors of the names, shapes and types that it was made for."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._shape = _shape(tensors)
        # As safetensors orders them, so that each is aligned.
        tensors = dict(sorted(tensors.items(), key=lambda item: -item[1].itemsize))
        sizes = [tensor.nbytes for tensor in tensors.values()]
        edges = list(itertools.accumulate(sizes, initial=0))
        header = _header(tensors, edges)
        is_on_gpu = any(tensor.is_cuda for tensor in tensors.values())
        self._bytes = _memory(len(header) + edges[-1], is_pinned=is_on_gpu)
        self._bytes[: len(header)] = torch.frombuffer(bytearray(header), dtype=torch.uint8)
        data = self._bytes[len(header) :]
        self._places = {
            name: data[start:stop].view(tensor.dtype).view(tensor.shape)
            for (name, tensor), (start, stop) in zip(
                tensors.items(), itertools.pairwise(edges), strict=True
            )
        }

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Payload:
        """One that holds these."""
        payload = cls(tensors)
        payload.fill(tensors)
        return payload

    def touch(self) -> None:
        """Have the system find memory for it now, not when it is filled first."""
        for place in self._places.values():
            place.zero_()

    def fits(self, tensors: Mapping[str, Tensor]) -> bool:
        """Whether it was made for such."""
        return self._shape == _shape(tensors)

    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy these in, from whatever device they are on."""
        for name, tensor in tensors.items():
            host_copy.copy(tensor, self._places[name], non_blocking=True)
        if any(tensor.is_cuda for tensor in tensors.values()):
            torch.cuda.synchronize()

    @property
    def content(self) -> memoryview:
        """The file, as it is now: bytes."""
        return self._bytes.numpy().data


def _shape(tensors: Mapping[str, Tensor]) -> list[tuple[str, torch.Size, torch.dtype]]:
    return [(name, tensor.shape, tensor.dtype) for name, tensor in tensors.items()]


def _header(tensors: Mapping[str, Tensor], edges: list[int]) -> bytes:
    """The length of what follows, and where each tensor is, as JSON (safetensors'
    documentation, "Format").
    """
    entries = {
        name: {
            "dtype": NAMES_OF_TYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, stop],
        }
        for (name, tensor), (start, stop) in zip(
            tensors.items(), itertools.pairwise(edges), strict=True
        )
    }
    text = json.dumps(entries).encode()
    text += b" " * (-(LENGTH_BYTES + len(text)) % ALIGNMENT)
    return len(text).to_bytes(LENGTH_BYTES, "little") + text


def _memory(size: int, *, is_pinned: bool) -> Tensor:
    if is_pinned:
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)
    return large_pages.empty_like(torch.empty(size, dtype=torch.uint8, device="meta"), device="cpu")
