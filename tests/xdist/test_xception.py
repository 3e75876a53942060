"""Xception's parameter counts, its padding, and what its options do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from xdist.models.xception import Xception, max_pool_same, spatial_conv


def num_parameters(**options: Any) -> int:
    with torch.device("meta"):
        model = Xception(**{"num_classes": 1000, **options})
    return sum(parameter.numel() for parameter in model.parameters())


def small(**options: Any) -> Xception:
    torch.manual_seed(0)
    return Xception(**{"num_classes": 10, "width": 0.1, "middle_modules": 1, **options})


def images(num_images: int = 2, size: int = 32) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return 2 * torch.rand(num_images, 3, size, size, generator=generator) - 1


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, 22_855_952),
        ({"residual": False}, 21_878_880),
        ({"mid_activation": "relu"}, 22_855_952),
        ({"mid_activation": "elu"}, 22_855_952),
        ({"fc": (4096, 4096)}, 50_077_968),
        ({"num_classes": 17_000}, 55_639_952),
        ({"num_classes": 17_000, "fc": (4096, 4096)}, 115_629_968),
    ],
    ids=str,
)
def test_parameter_counts_are_the_papers(options: dict[str, Any], expected: int) -> None:
    assert num_parameters(**options) == expected


@pytest.mark.parametrize(
    ("segments", "millions"),
    [
        (1, 183.617), (2, 103.133), (3, 76.305), (4, 62.891), (8, 42.770), (16, 32.710),
        (32, 27.680), (104, 24.198), (364, 23.095), (None, 22.856), (4096, 22.856),
    ],
)  # fmt: skip
def test_parameter_counts_along_the_spectrum_of_segments(
    segments: int | None, millions: float
) -> None:
    assert round(num_parameters(segments=segments) / 1e6, 3) == millions


@pytest.mark.parametrize(
    ("segments", "width", "millions"),
    [  # 0.5437 and 0.5988 are 0.544 and 0.599 before they were rounded
        (1, 0.346, 21.889), (2, 0.467, 22.650), (3, 0.5437, 22.737), (4, 0.5988, 22.764),
        (8, 0.721, 22.834),
    ],
)  # fmt: skip
def test_parameter_counts_at_equal_budget(segments: int, width: float, millions: float) -> None:
    assert round(num_parameters(segments=segments, width=width) / 1e6, 3) == millions


def test_there_are_36_convolutional_layers_besides_the_skips() -> None:
    with torch.device("meta"):
        names = dict(Xception(num_classes=1000).named_modules())
    pointwise = [name for name in names if name.endswith("pointwise")]
    stem = [
        name for name, module in names.items() if "stem" in name and isinstance(module, nn.Conv2d)
    ]
    assert len(pointwise) + len(stem) == 36


@pytest.mark.parametrize(
    ("size", "sizes"), [(299, [147, 74, 37, 19, 10]), (224, [109, 55, 28, 14, 7])]
)
def test_feature_maps_have_the_published_sizes(size: int, sizes: list[int]) -> None:
    with torch.device("meta"):
        model = Xception(num_classes=10, width=0.1, middle_modules=0)
        x = model.stem(torch.empty(1, 3, size, size))
        seen = [x.shape[-1]]
        for module in (*model.entry_flow, model.exit_flow[0]):
            x = module(x)
            seen.append(x.shape[-1])
    assert seen == sizes


@pytest.mark.parametrize("height", range(1, 10))
@pytest.mark.parametrize("width", [6, 7])
def test_max_pool_pads_as_tensorflow(height: int, width: int) -> None:
    x = torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(height))

    def same(size: int) -> tuple[int, int]:  # tf.nn's definition, window 3, stride 2
        total = max((-(-size // 2) - 1) * 2 + 3 - size, 0)
        return total // 2, total - total // 2

    padded = F.pad(x, (*same(width), *same(height)), value=-torch.inf)
    assert torch.equal(max_pool_same(x), F.max_pool2d(padded, 3, stride=2))


@pytest.mark.parametrize(("channels", "segments"), [(8, 3), (10, 4), (9, 9), (8, 2), (8, 100)])
def test_a_segment_sees_its_own_channels_only(channels: int, segments: int) -> None:
    conv = spatial_conv(channels, segments=segments)
    x = torch.zeros(1, channels, 5, 5)
    groups = []
    for channel in range(channels):
        moved = x.clone()
        moved[:, channel] = 1.0
        changed = (conv(moved) != conv(x)).any(dim=-1).any(dim=-1)[0]
        groups.append(tuple(changed.nonzero().flatten().tolist()))
    sizes = [len(group) for group in dict.fromkeys(groups)]
    assert all(channel in group for channel, group in enumerate(groups))
    assert len(sizes) == min(segments, channels)
    assert sum(sizes) == channels
    assert max(sizes) - min(sizes) <= 1


def test_one_segment_a_channel_is_the_depthwise_network() -> None:
    state = small().state_dict()
    other = small(segments=10_000)
    other.load_state_dict(state)
    reference = small()
    reference.load_state_dict(state)
    assert torch.equal(reference.eval()(images()), other.eval()(images()))


@pytest.mark.parametrize(
    "option", [{"residual": False}, {"mid_activation": "relu"}, {"mid_activation": "elu"}]
)
def test_options_change_the_logits(option: dict[str, Any]) -> None:
    state = small().state_dict()
    changed = small(**option)
    changed.load_state_dict(state, strict=False)
    assert not torch.allclose(changed.eval()(images()), small().eval()(images()))


@pytest.mark.parametrize("size", [7, 8, 31, 32, 33])
def test_small_and_odd_inputs_work(size: int) -> None:
    assert small().eval()(images(size=size)).shape == (2, 10)


def test_dropout_changes_logits_in_training_only() -> None:
    model = small(dropout=0.5, fc=(16,))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()  # so that dropout alone is random
    assert not torch.equal(model(images()), model(images()))
    model.eval()
    assert torch.equal(model(images()), model(images()))


def test_batch_norm_moves_in_training_with_momentum_and_epsilon_of_the_source() -> None:
    model = small()
    norm = model.stem[1]
    assert isinstance(norm, nn.BatchNorm2d)
    assert (norm.eps, norm.momentum) == (1e-3, 0.01)
    of_batch = model.stem[0](images()).mean(dim=(0, 2, 3))
    model(images())
    assert norm.running_mean is not None
    torch.testing.assert_close(norm.running_mean, 0.01 * of_batch)


def test_in_place_operations_leave_the_gradient_right() -> None:
    """Gradients of the input agree with finite differences, in float64."""
    model = small(width=0.05).double().eval()
    x = images(num_images=1, size=9).double().requires_grad_()
    direction = torch.randn_like(x)
    (gradient,) = torch.autograd.grad(model(x).square().sum(), x)
    step = 1e-6

    def value(sign: float) -> Tensor:
        logits: Tensor = model(x.detach() + sign * step * direction)
        return logits.square().sum()

    numeric = (value(1) - value(-1)) / (2 * step)
    torch.testing.assert_close((gradient * direction).sum(), numeric, rtol=1e-4, atol=1e-8)


def test_memory_format_of_the_input_changes_nothing_but_rounding() -> None:
    model = small().eval()
    channels_last = images().to(memory_format=torch.channels_last)
    torch.testing.assert_close(model(channels_last), model(images()), rtol=1e-4, atol=1e-5)
