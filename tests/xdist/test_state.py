"""A range's state moves the same way, wherever its versions are written."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from xdist.config import OptimizerConfig
from xdist.state import RangeState
from xdist.update import Parts, Step

SIZE = 1003
CPU = torch.device("cpu")
SGD = OptimizerConfig(name="sgd", l2=1e-4, average_decay=0.9)
RMSPROP = OptimizerConfig(name="rmsprop", l2=4e-5, average_decay=0.9)


def normal(seed: int) -> Tensor:
    return torch.randn(SIZE, generator=torch.Generator().manual_seed(seed))


def state(config: OptimizerConfig, *, is_fused: bool = False) -> RangeState:
    mask = (torch.arange(SIZE) % 3 > 0).float()
    return RangeState.from_tensors(
        {"weights": normal(0)},
        config=config,
        start=0,
        stop=SIZE,
        l2_mask=mask,
        is_fused=is_fused,
    )


def assert_equal(one: RangeState, other: RangeState) -> None:
    expected = other.tensors()
    for name, tensor in one.tensors().items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("config", [SGD, RMSPROP], ids=["sgd", "rmsprop"])
def test_versions_in_turns_equal_those_in_place(config: OptimizerConfig) -> None:
    in_place, in_turns = state(config), state(config)
    buffers = [in_turns.weights, torch.empty(SIZE)]
    rounded = torch.empty(SIZE, dtype=torch.bfloat16)
    for version in range(1, 5):
        before = in_turns.weights.clone()
        in_place.apply(Step(normal(version), 0.1, average_share=0.1))
        in_turns.apply(
            Step(normal(version), 0.1, average_share=0.1),
            weights_out=buffers[version % 2],
            bfloat16_out=rounded,
        )
        assert in_turns.weights is buffers[version % 2]
        assert torch.equal(buffers[1 - version % 2], before)  # Who still reads it, reads it whole.
        assert torch.equal(rounded, in_turns.weights.to(torch.bfloat16))
        assert_equal(in_turns, in_place)


@pytest.mark.parametrize("config", [SGD, RMSPROP], ids=["sgd", "rmsprop"])
def test_gradients_are_scaled_and_may_be_bfloat16(config: OptimizerConfig) -> None:
    plain, scaled, half = state(config), state(config), state(config)
    for version in range(1, 5):
        gradients = normal(version).to(torch.bfloat16)
        plain.apply(Step(gradients.float() * 0.3, 0.1, average_share=0.1))
        scaled.apply(Step(gradients.float(), 0.1, scale=0.3, average_share=0.1))
        half.apply(Step(gradients, 0.1, scale=0.3, average_share=0.1), num_threads=2)
    assert_equal(scaled, plain)
    assert_equal(half, plain)


@pytest.mark.parametrize("is_fused", [False, True])
@pytest.mark.parametrize("config", [SGD, RMSPROP], ids=["sgd", "rmsprop"])
def test_steps_at_once_equal_steps_one_by_one(config: OptimizerConfig, is_fused: bool) -> None:
    one_by_one, at_once = state(config), state(config, is_fused=is_fused)
    steps = [Step(normal(n), 0.1 / n, average_share=0.1 * n) for n in range(1, 4)]
    for step in steps:
        one_by_one.apply(replace(step, gradients=step.whole_gradients_on(CPU).clone()))
    at_once.apply(*steps)
    assert_equal(at_once, one_by_one)


@pytest.mark.parametrize("config", [SGD, RMSPROP], ids=["sgd", "rmsprop"])
def test_a_compiled_update_reads_and_writes_elsewhere_too(config: OptimizerConfig) -> None:
    """As a server with a GPU has it: scaled gradients in parts, copies of the new weights."""
    plain, fused = state(config), state(config, is_fused=True)
    gradients = normal(1).to(torch.bfloat16)
    expected, found = torch.empty(SIZE), torch.empty(SIZE)
    rounded = torch.empty(SIZE, dtype=torch.bfloat16)
    plain.apply(Step(gradients, 0.1, scale=0.3, average_share=0.1), weights_out=expected)
    parts = Parts({500: gradients[500:], 0: gradients[:500]})
    step = Step(parts, 0.1, scale=0.3, average_share=0.1)
    fused.apply(step, weights_out=found, bfloat16_out=rounded)
    assert_equal(fused, plain)
    assert torch.equal(found, expected)
    assert torch.equal(rounded, expected.to(torch.bfloat16))
    assert fused.weights is not found
