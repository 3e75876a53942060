"""The flat vectors are the model's own memory, and their layout survives JSON."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.strategies import collect_gradients
from xdist.flat import LARGE, FlatModel, Layout, even_ranges
from xdist.models.xception import Xception


def small_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4, momentum=0.01), nn.ReLU(),
        nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5, momentum=0.01), nn.Flatten(), nn.Linear(20, 3),
    )  # fmt: skip


def images(num_images: int = 6) -> Tensor:
    return torch.rand(num_images, 3, 6, 6, generator=torch.Generator().manual_seed(1))


@settings(derandomize=True, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 40))
def test_even_ranges_cover_everything_once_and_differ_by_one(size: int, num_ranges: int) -> None:
    ranges = even_ranges(size, num_ranges)
    assert len(ranges) == num_ranges
    assert [i for start, stop in ranges for i in range(start, stop)] == list(range(size))
    lengths = [stop - start for start, stop in ranges]
    assert max(lengths) - min(lengths) <= 1


def test_no_ranges_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        even_ranges(10, 0)


def test_flattening_changes_no_output() -> None:
    expected = small_model().eval()(images())
    flat = FlatModel(small_model())
    assert torch.equal(flat.model.eval()(images()), expected)


def test_the_vector_is_the_memory_of_the_parameters() -> None:
    flat = FlatModel(small_model())
    joined = torch.cat([parameter.detach().flatten() for parameter in flat.model.parameters()])
    assert torch.equal(flat.weights, joined)
    flat.weights.zero_()
    assert all(not parameter.any() for parameter in flat.model.parameters())
    flat.model.load_state_dict(small_model().state_dict())
    assert torch.equal(flat.weights, joined)


def test_the_flat_gradient_is_that_of_the_parameters_in_order() -> None:
    reference, flat = small_model(), FlatModel(small_model())
    for _ in range(2):  # The second time shows that nothing is added to what was there.
        reference.zero_grad()
        flat.model(images()).square().sum().backward()
        collect_gradients(flat)
        reference(images()).square().sum().backward()
        expected = [p.grad.flatten() for p in reference.parameters() if p.grad is not None]
        assert torch.equal(flat.gradients, torch.cat(expected))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_contiguous", [False, True])
def test_large_gradients_are_collected_as_small_ones_are(
    is_contiguous: bool, dtype: torch.dtype
) -> None:
    flat = FlatModel(nn.Sequential(nn.Linear(3, 2), nn.Linear(301, 307)))
    flat.gradients = flat.gradients.to(dtype)
    gradient = torch.randn(301, 307).T
    gradient = gradient.contiguous() if is_contiguous else gradient
    assert gradient.numel() > LARGE
    for number in range(1, 3):
        flat.collect(2, gradient, adds=number > 1)
        expected = (gradient * number).to(dtype)
        assert torch.equal(flat.layout.parameters[2].view(flat.gradients), expected)
        assert not flat.gradients[:8].any()


def test_statistics_hold_those_of_the_last_batch_alone() -> None:
    model = small_model()
    flat = FlatModel(model)
    flat.model(images() + 5)
    flat.model(images())
    first = model[0](images())
    torch.testing.assert_close(flat.statistics[:4], first.mean(dim=(0, 2, 3)))
    torch.testing.assert_close(flat.statistics[4:8], first.var(dim=(0, 2, 3), unbiased=True))


def test_folding_statistics_equals_torchs_running_values() -> None:
    reference, flat = small_model(), FlatModel(small_model())
    running = flat.statistics.clone()
    for shift in range(3):
        reference(images() + shift)
        flat.model(images() + shift)
        running.lerp_(flat.statistics, flat.layout.statistics_momentum)
    for entry in flat.layout.statistics:
        torch.testing.assert_close(entry.view(running), reference.get_buffer(entry.name))


def test_an_evaluation_uses_what_is_copied_into_the_statistics() -> None:
    flat = FlatModel(small_model())
    before = flat.model.eval()(images())
    flat.statistics.mul_(2)
    assert not torch.equal(flat.model(images()), before)


def test_layout_names_every_parameter_and_survives_json() -> None:
    layout = FlatModel(small_model()).layout
    assert [entry.name for entry in layout.parameters] == [
        name for name, _ in small_model().named_parameters()
    ]
    assert [entry.name for entry in layout.statistics] == [
        "1.running_mean", "1.running_var", "4.running_mean", "4.running_var",
    ]  # fmt: skip
    for before, after in itertools.pairwise(layout.parameters):
        assert before.offset + before.size == after.offset
    assert Layout.from_json(json.loads(json.dumps(layout.to_json()))) == layout


def test_l2_mask_leaves_out_biases_and_batch_norms() -> None:
    layout = FlatModel(small_model()).layout
    mask = layout.l2_mask("kernels")
    masked = {entry.name for entry in layout.parameters if entry.view(mask).all()}
    assert masked == {"0.weight", "3.weight", "6.weight"}
    assert mask.sum() == sum(entry.size for entry in layout.parameters if entry.name in masked)
    assert layout.l2_mask("all").all()


def test_batch_norms_of_different_momentum_are_refused() -> None:
    model = nn.Sequential(nn.BatchNorm2d(2, momentum=0.1), nn.BatchNorm2d(2, momentum=0.2))
    with pytest.raises(ValueError, match="momentum"):
        FlatModel(model)


def test_a_model_without_batch_norm_has_empty_statistics() -> None:
    flat = FlatModel(nn.Linear(3, 2))
    assert flat.statistics.shape == (0,)
    assert flat.weights.shape == (8,)


def test_half_precision_parameters_are_refused() -> None:
    with pytest.raises(ValueError, match="float32"):
        FlatModel(nn.Linear(3, 2).bfloat16())


def test_parts_of_xceptions_vector_are_aligned_to_32_bytes() -> None:
    with torch.device("meta"):
        layout = FlatModel(Xception(num_classes=1000, width=0.25)).layout
    assert all(entry.offset % 8 == 0 for entry in layout.parameters)
