"""What is sent of a gradient: all of it, once, while it is made; and rounded without a drift."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from xdist import wire
from xdist.flat import FlatModel
from xdist.gradient_slots import GradientSlots
from xdist.servers_config import ServersConfig
from xdist.strategies.outbox import Outbox, Outgoing

BFLOAT16 = ServersConfig(wire="bfloat16")


@pytest.fixture
def flat(monkeypatch: pytest.MonkeyPatch) -> FlatModel:
    """Small buckets: the second layer is one, the first one and what is between another."""
    monkeypatch.setattr("xdist.strategies.outbox.BUCKET_BYTES", 100)
    torch.manual_seed(0)
    flat = FlatModel(nn.Sequential(nn.Linear(7, 9), nn.BatchNorm1d(9), nn.Linear(9, 5)))
    flat.gradients.normal_()
    return flat


def sent(outbox: Outbox, order: Sequence[int] = ()) -> Iterator[Outgoing]:
    """All of one gradient, whose parameters are ready in this order."""
    outbox.begin()
    for parameter in order:
        yield from outbox.ready(parameter)
    yield from outbox.rest()
    outbox.end()


def joined(parts: Iterator[Outgoing], size: int) -> torch.Tensor:
    """The gradient that they are parts of."""
    out = torch.full((size,), torch.nan)
    for part in parts:
        place = out[part.start : part.start + len(part.values)]
        assert place.isnan().all(), "nothing is sent twice"
        place.copy_(part.values)
    return out


@pytest.mark.parametrize("is_shared", [False, True])
@pytest.mark.parametrize("config", [ServersConfig(), BFLOAT16])
def test_all_of_a_gradient_is_sent_once(
    flat: FlatModel, config: ServersConfig, is_shared: bool
) -> None:
    outbox = Outbox(config, flat)
    if is_shared:
        outbox.share("gradients")
    else:
        outbox.keep()
    for _ in range(3):
        flat.gradients.normal_()
        order = torch.randperm(len(flat.layout.parameters)).tolist()
        result = joined(sent(outbox, order), len(flat.gradients))
        assert torch.equal(result, flat.gradients.to(wire.dtype_of(config)).float())


def test_what_is_whole_is_sent_while_the_rest_is_computed(flat: FlatModel) -> None:
    outbox = Outbox(ServersConfig(), flat)
    outbox.keep()
    outbox.begin()
    assert not list(outbox.ready(5))
    [part] = outbox.ready(4)
    assert part.start + len(part.values) == len(flat.gradients)


def test_servers_see_a_push_in_its_slot_while_the_next_one_is_computed(flat: FlatModel) -> None:
    outbox = Outbox(ServersConfig(overlap=1), flat)
    address = outbox.share("gradients")
    assert address is not None
    slots = GradientSlots.open(address).slots
    gradients = torch.randn(3, len(flat.gradients))
    numbers = []
    for gradient in gradients:
        numbers.append(outbox.slot)
        flat.gradients.copy_(gradient)
        list(sent(outbox))
    assert numbers == [0, 1, 0]
    assert torch.equal(slots[0], gradients[2])
    assert torch.equal(slots[1], gradients[1])


def test_another_incarnation_writes_elsewhere(flat: FlatModel) -> None:
    outbox = Outbox(ServersConfig(), flat)
    address = outbox.share("gradients")
    assert address is not None
    [old] = GradientSlots.open(address).slots
    flat.gradients.normal_()
    list(sent(outbox))
    before = old.clone()
    assert before.any()
    outbox.share("gradients")
    flat.gradients.normal_()
    list(sent(outbox))
    assert torch.equal(old, before)


def test_error_feedback_sends_in_the_end_what_was_to_be_sent(flat: FlatModel) -> None:
    outbox = Outbox(ServersConfig(wire="bfloat16", error_feedback=True), flat)
    outbox.keep()
    total, size = torch.zeros_like(flat.gradients), len(flat.gradients)
    for _ in range(64):
        total += joined(sent(outbox), size)
    assert torch.allclose(total, flat.gradients * 64, rtol=1e-3, atol=1e-3)


@given(st.lists(st.floats(width=32, allow_nan=False), max_size=50))
def test_numpy_and_torch_see_the_same_memory(values: list[float]) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        tensor = torch.tensor(values, dtype=torch.float32).to(dtype)
        vector = wire.as_vector(tensor)
        assert vector.dtype == (np.float32 if dtype == torch.float32 else np.uint16)
        vector.setflags(write=False)  # As what comes through Ray.
        seen = wire.as_tensor(vector)
        assert seen.dtype == dtype
        assert torch.equal(seen, tensor)
