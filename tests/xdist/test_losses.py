"""The losses over sparse labels equal their dense definitions."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from xdist import losses

NUM_CLASSES = 7
label_sets = st.lists(st.sets(st.integers(0, NUM_CLASSES - 1)), min_size=1, max_size=6)
properties = settings(derandomize=True, deadline=None, max_examples=50)


def sparse(label_sets: list[set[int]]) -> tuple[Tensor, Tensor]:
    ids = [label for labels in label_sets for label in sorted(labels)]
    offsets = torch.tensor([0, *(len(labels) for labels in label_sets)]).cumsum(0)
    return torch.tensor(ids, dtype=torch.int64), offsets


def dense(label_sets: list[set[int]]) -> Tensor:
    targets = torch.zeros(len(label_sets), NUM_CLASSES)
    for i, labels in enumerate(label_sets):
        targets[i, list(labels)] = 1.0
    return targets


def logits_for(label_sets: list[set[int]]) -> Tensor:
    generator = torch.Generator().manual_seed(len(label_sets))
    return (5 * torch.randn(len(label_sets), NUM_CLASSES, generator=generator)).requires_grad_()


def assert_equal_with_gradients(ours: Tensor, reference: Tensor, logits: Tensor) -> None:
    torch.testing.assert_close(ours, reference)
    weights = torch.arange(1.0, len(ours) + 1)
    torch.testing.assert_close(
        torch.autograd.grad((ours * weights).sum(), logits),
        torch.autograd.grad((reference * weights).sum(), logits),
    )


@properties
@given(label_sets)
def test_sigmoid_loss_equals_the_dense_one(label_sets: list[set[int]]) -> None:
    logits = logits_for(label_sets)
    reference = F.binary_cross_entropy_with_logits(logits, dense(label_sets), reduction="none")
    ours = losses.sigmoid_cross_entropy(logits, *sparse(label_sets))
    assert_equal_with_gradients(ours, reference.sum(dim=1), logits)


@properties
@given(label_sets, st.sampled_from([0.0, 0.1]))
def test_softmax_loss_equals_the_dense_one(label_sets: list[set[int]], smoothing: float) -> None:
    logits = logits_for(label_sets)
    targets = F.normalize(dense(label_sets), p=1, dim=1)
    reference = F.cross_entropy(logits, targets, reduction="none", label_smoothing=smoothing)
    reference = reference * (targets.sum(dim=1) > 0)  # torch would smooth a target of nothing
    ours = losses.softmax_cross_entropy(logits, *sparse(label_sets), label_smoothing=smoothing)
    assert_equal_with_gradients(ours, reference, logits)


def test_large_logits_stay_finite() -> None:
    logits = torch.tensor([[1e4, -1e4, 0.0]])
    ids, offsets = torch.tensor([1]), torch.tensor([0, 1])
    assert losses.softmax_cross_entropy(logits, ids, offsets).item() == pytest.approx(2e4)
    expected = 2e4 + math.log(2)
    assert losses.sigmoid_cross_entropy(logits, ids, offsets).item() == pytest.approx(expected)


def test_half_precision_logits_give_float32_losses() -> None:
    logits = torch.zeros(1, 3, dtype=torch.bfloat16)
    ids, offsets = torch.tensor([1]), torch.tensor([0, 1])
    for loss in (losses.softmax_cross_entropy, losses.sigmoid_cross_entropy):
        assert loss(logits, ids, offsets).dtype == torch.float32
