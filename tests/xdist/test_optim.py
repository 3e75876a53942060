"""Optimizers equal their references, and any cut of the vector equals the whole to the bit."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor, nn

from xdist.config import OptimizerConfig
from xdist.flat import FlatModel, even_ranges
from xdist.optim import CPU_BLOCK, Optimizer, average_decay, fold, learning_rate, make_optimizer
from xdist.state import RangeState
from xdist.update import Step, Update

SIZE = CPU_BLOCK + 1003  # More than one block, and a tail that fills no vector register.
SGD = OptimizerConfig(name="sgd", l2=1e-4)
RMSPROP = OptimizerConfig(name="rmsprop", l2=4e-5, rmsprop_epsilon=1e-3)


def normal(seed: int, size: int = SIZE) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def mask(size: int = SIZE) -> Tensor:
    return (torch.arange(size) % 3 > 0).float()


def rate(step: int) -> float:
    return 0.05 * 0.9**step


def run(optimizer: Optimizer, weights: Tensor, part: slice, *, num_steps: int) -> None:
    for step in range(num_steps):
        gradients = normal(1 + step)[part].clone()
        optimizer.step(Update(weights, [Step(gradients, rate(step))]))


@pytest.mark.parametrize("config", [SGD, RMSPROP], ids=["sgd", "rmsprop"])
@pytest.mark.parametrize("num_ranges", [2, 7])
def test_ranges_equal_the_whole_to_the_bit(config: OptimizerConfig, num_ranges: int) -> None:
    whole = normal(0)
    optimizer = make_optimizer(config, size=SIZE, l2_mask=mask())
    run(optimizer, whole, slice(None), num_steps=3)
    for start, stop in even_ranges(SIZE, num_ranges):
        part = slice(start, stop)
        weights = normal(0)[part].clone()
        of_range = make_optimizer(config, size=stop - start, l2_mask=mask()[part])
        run(of_range, weights, part, num_steps=3)
        assert torch.equal(weights, whole[part])
        for name, slot in of_range.slots.items():
            assert torch.equal(slot, optimizer.slots[name][part])


@pytest.mark.parametrize("config", [SGD, RMSPROP], ids=["sgd", "rmsprop"])
def test_single_elements_equal_the_whole_to_the_bit(config: OptimizerConfig) -> None:
    """Vector and scalar code paths agree: no operation is fused in one of them only."""
    whole = normal(0, 37)
    run_short(make_optimizer(config, size=37, l2_mask=mask(37)), whole, slice(None))
    for i in range(37):
        weight = normal(0, 37)[i : i + 1].clone()
        run_short(
            make_optimizer(config, size=1, l2_mask=mask(37)[i : i + 1]), weight, slice(i, i + 1)
        )
        assert torch.equal(weight, whole[i : i + 1])


def run_short(optimizer: Optimizer, weights: Tensor, part: slice) -> None:
    for step in range(5):
        gradients = normal(1 + step, 37)[part].clone()
        optimizer.step(Update(weights, [Step(gradients, rate(step))]))


@pytest.mark.parametrize("config", [SGD, RMSPROP], ids=["sgd", "rmsprop"])
def test_steps_are_single_ieee_operations_in_the_documented_order(config: OptimizerConfig) -> None:
    """numpy rounds after every operation, as a C kernel without contraction does."""
    weights = normal(0)
    optimizer = make_optimizer(config, size=SIZE, l2_mask=mask())
    run(optimizer, weights, slice(None), num_steps=3)
    f32 = np.float32
    w, momentum, mean_square = normal(0).numpy(), np.zeros(SIZE, f32), np.ones(SIZE, f32)
    for step in range(3):
        g = normal(1 + step).numpy()
        g = g + w * (mask().numpy() * f32(config.l2))
        if config.name == "sgd":
            momentum = momentum * f32(config.momentum) + g
            w = w - momentum * f32(rate(step))
        else:
            mean_square = mean_square + (g * g - mean_square) * f32(1 - config.rmsprop_decay)
            root = np.sqrt(mean_square + f32(config.rmsprop_epsilon))
            scaled = g * f32(rate(step)) * (f32(1) / root)
            momentum = momentum * f32(config.momentum) + scaled
            w = w - momentum
    assert np.array_equal(weights.numpy(), w)


def test_sgd_equals_torch_per_tensor() -> None:
    tensors = [
        torch.nn.Parameter(part.clone()) for part in torch.split(normal(0, 90), [50, 30, 10])
    ]
    reference = torch.optim.SGD(tensors, lr=0.1, momentum=0.9, weight_decay=1e-3)
    config = OptimizerConfig(momentum=0.9, l2=1e-3)
    optimizer, weights = make_optimizer(config, size=90, l2_mask=torch.ones(90)), normal(0, 90)
    for step in range(20):
        for tensor, gradient in zip(
            tensors, torch.split(normal(1 + step, 90), [50, 30, 10]), strict=True
        ):
            tensor.grad = gradient.clone()
        reference.param_groups[0]["lr"] = rate(step)
        reference.step()
        optimizer.step(Update(weights, [Step(normal(1 + step, 90), rate(step))]))
    expected = torch.cat([tensor.detach() for tensor in tensors])
    torch.testing.assert_close(weights, expected, rtol=1e-6, atol=1e-7)  # torch may fuse


def tensorflow_rmsprop(
    weights: NDArray[np.float64], gradients: list[NDArray[np.float64]], *, epsilon: float, l2: float
) -> NDArray[np.float64]:
    """tf.raw_ops.ResourceApplyRMSProp, decay and momentum 0.9, in float64, and the L2 term."""
    mean_square, momentum = np.ones_like(weights), np.zeros_like(weights)
    for step, gradient in enumerate(gradients):
        gradient = gradient + l2 * weights
        mean_square = 0.9 * mean_square + 0.1 * gradient * gradient
        momentum = 0.9 * momentum + rate(step) * gradient / np.sqrt(mean_square + epsilon)
        weights = weights - momentum
    return weights


@pytest.mark.parametrize("epsilon", [1.0, 1e-3, 1e-10])
def test_rmsprop_equals_tensorflows_recurrence_over_100_steps(epsilon: float) -> None:
    config = OptimizerConfig(name="rmsprop", rmsprop_epsilon=epsilon, l2=4e-5)
    optimizer, weights = make_optimizer(config, size=200, l2_mask=torch.ones(200)), normal(0, 200)
    for step in range(100):
        optimizer.step(Update(weights, [Step(normal(1 + step, 200), rate(step))]))
    gradients = [normal(1 + step, 200).double().numpy() for step in range(100)]
    start = normal(0, 200).double().numpy()
    expected = tensorflow_rmsprop(start, gradients, epsilon=epsilon, l2=4e-5)
    # 100 steps round 100 times to float32, whose relative unit is 6e-8; weights are about 1.
    np.testing.assert_allclose(weights.double().numpy(), expected, rtol=1e-6, atol=1e-6)


def test_rmsprop_of_the_reference_example() -> None:
    """From w = 1, lr 1e-3 and five gradients TensorFlow reaches 0.999010, torch 0.998807."""
    config = OptimizerConfig(name="rmsprop", l2=0.0)
    optimizer, weight = make_optimizer(config, size=1, l2_mask=torch.ones(1)), torch.ones(1)
    for gradient in (0.3, -0.2, 0.05, 0.4, -0.1):
        optimizer.step(Update(weight, [Step(torch.tensor([gradient]), 1e-3)]))
    assert weight.item() == pytest.approx(0.999010, abs=5e-7)


def test_l2_moves_only_masked_weights() -> None:
    optimizer = make_optimizer(OptimizerConfig(l2=0.1), size=2, l2_mask=torch.tensor([1.0, 0.0]))
    weights = torch.ones(2)
    optimizer.step(Update(weights, [Step(torch.zeros(2), 1.0)]))
    torch.testing.assert_close(weights, torch.tensor([0.9, 1.0]))


@pytest.mark.parametrize("config", [SGD, RMSPROP], ids=["sgd", "rmsprop"])
def test_slots_are_the_whole_state(config: OptimizerConfig) -> None:
    optimizer, weights = make_optimizer(config, size=5, l2_mask=mask(5)), normal(0, 5)
    optimizer.step(Update(weights, [Step(normal(1, 5), 0.1)]))
    resumed, resumed_weights = make_optimizer(config, size=5, l2_mask=mask(5)), weights.clone()
    for name, slot in copy.deepcopy(optimizer.slots).items():
        resumed.slots[name].copy_(slot)
    optimizer.step(Update(weights, [Step(normal(2, 5), 0.1)]))
    resumed.step(Update(resumed_weights, [Step(normal(2, 5), 0.1)]))
    assert torch.equal(weights, resumed_weights)


@pytest.mark.parametrize("config", [SGD, RMSPROP], ids=["sgd", "rmsprop"])
def test_a_flat_vector_equals_its_tensors_to_the_bit(config: OptimizerConfig) -> None:
    torch.manual_seed(0)
    flat = FlatModel(nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.Linear(7, 3)))
    l2_mask = flat.layout.l2_mask("kernels")
    tensors = [entry.view(flat.weights).flatten().clone() for entry in flat.layout.parameters]
    masks = [entry.view(l2_mask).flatten() for entry in flat.layout.parameters]
    each = [make_optimizer(config, size=len(mask), l2_mask=mask) for mask in masks]
    whole = make_optimizer(config, size=len(flat.weights), l2_mask=l2_mask)
    for step in range(5):
        gradients = normal(1 + step, len(flat.weights))
        for entry, tensor, optimizer in zip(flat.layout.parameters, tensors, each, strict=True):
            gradient = entry.view(gradients).flatten().clone()
            optimizer.step(Update(tensor, [Step(gradient, rate(step))]))
        whole.step(Update(flat.weights, [Step(gradients, rate(step))]))
    assert torch.equal(torch.cat(tensors), flat.weights)


def test_an_empty_range_can_be_stepped() -> None:
    optimizer = make_optimizer(RMSPROP, size=0, l2_mask=torch.ones(0))
    optimizer.step(Update(torch.ones(0), [Step(torch.ones(0), 0.1)]))


def test_learning_rate_is_a_staircase_of_samples() -> None:
    config = OptimizerConfig(learning_rate=0.045, decay_factor=0.94, decay_every=100)
    assert [learning_rate(config, samples) for samples in (0, 99, 100, 250)] == pytest.approx(
        [0.045, 0.045, 0.045 * 0.94, 0.045 * 0.94**2]
    )


def test_warm_up_rises_from_zero() -> None:
    config = OptimizerConfig(learning_rate=0.8, warmup_samples=100)
    assert [learning_rate(config, samples) for samples in (0, 25, 100, 1000)] == pytest.approx(
        [0.0, 0.2, 0.8, 0.8]
    )


@settings(derandomize=True, deadline=None)
@given(st.integers(0, 10**9), st.integers(1, 10**7), st.integers(0, 10**6))
def test_learning_rate_is_never_negative_or_above_the_first(
    samples: int, decay_every: int, warmup: int
) -> None:
    config = OptimizerConfig(decay_every=decay_every, warmup_samples=warmup)
    assert 0 <= learning_rate(config, samples) <= config.learning_rate


def test_average_decay_halves_after_the_half_life_for_any_batch_size() -> None:
    config = OptimizerConfig(average_half_life_samples=6400)
    for num_samples in (32, 640):
        decay = average_decay(config, num_samples=num_samples, num_updates=10**9)
        assert decay ** (6400 / num_samples) == pytest.approx(0.5)


def test_average_decay_starts_with_tensorflows_bound() -> None:
    for config in (
        OptimizerConfig(average_decay=0.995),
        OptimizerConfig(average_half_life_samples=10**6),
    ):
        decays = [average_decay(config, num_samples=32, num_updates=n) for n in (0, 1, 90)]
        assert decays == pytest.approx([0.1, 2 / 11, 0.91])
    late = average_decay(OptimizerConfig(average_decay=0.995), num_samples=32, num_updates=10**6)
    assert late == 0.995


def test_without_an_average_it_is_the_weights() -> None:
    decay = average_decay(OptimizerConfig(), num_samples=32, num_updates=5)
    average = torch.zeros(4)
    fold(average, normal(0, 4), share=1 - decay)
    assert torch.equal(average, normal(0, 4))


def test_folding_ranges_equals_folding_the_whole_to_the_bit() -> None:
    whole = normal(0)
    fold(whole, normal(1), share=0.3)
    torch.testing.assert_close(whole, torch.lerp(normal(0), normal(1), 0.3))
    for start, stop in even_ranges(SIZE, 7):
        part = normal(0)[start:stop].clone()
        fold(part, normal(1)[start:stop], share=0.3)
        assert torch.equal(part, whole[start:stop])


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "config",
    [pytest.param(SGD, id="sgd", marks=pytest.mark.by_hand), pytest.param(RMSPROP, id="rmsprop")],
)
def test_a_fused_update_equals_the_plain_one_to_the_bit_on_a_cpu(config: OptimizerConfig) -> None:
    config = replace(config, average_decay=0.9)
    plain, fused = (
        RangeState.from_tensors(
            {"weights": normal(0)},
            config=config,
            start=0,
            stop=SIZE,
            l2_mask=mask(),
            is_fused=is_fused,
        )
        for is_fused in (False, True)
    )
    for step in range(3):
        for state in (plain, fused):
            decay = average_decay(config, num_samples=8, num_updates=step)
            state.apply(Step(normal(1 + step), rate(step), average_share=1 - decay))
    tensors = fused.tensors()
    for name, tensor in plain.tensors().items():
        assert torch.equal(tensor, tensors[name])
