"""Inception V3's two layouts, its padding and its two stems."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from xdist.models.inception_v3 import Branches, Conv, ConvNorm, InceptionV3, Layout

LAYOUTS: list[Layout] = ["today", "2016"]


def full(layout: Layout = "today", **options: Any) -> InceptionV3:
    with torch.device("meta"):
        return InceptionV3(num_classes=10, layout=layout, **options)


def shapes(layout: Layout) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in full(layout).state_dict().items()}


def sizes_of_maps(network: InceptionV3, size: int) -> list[tuple[int, int]]:
    """(channels, pixels a side) after the stem and after every inception module."""
    x = network.stem(torch.empty(2, 3, size, size, device="meta"))
    maps = [x]
    for module in network.mixed:
        maps.append(module(maps[-1]))
    assert all(x.shape[2] == x.shape[3] for x in maps)
    return [(x.shape[1], x.shape[2]) for x in maps]


def naive_same(x: Tensor, window: tuple[int, int], *, value: float = 0.0) -> Tensor:
    """`x` padded as tf.nn defines "same" for a window of stride 1."""
    rows, columns = window
    top, left = (rows - 1) // 2, (columns - 1) // 2
    return F.pad(x, (left, columns - 1 - left, top, rows - 1 - top), value=value)


def random_map(height: int, width: int) -> Tensor:
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(height))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_feature_maps_have_the_published_sizes(layout: Layout) -> None:
    grid_35 = [(256, 35)] * 3 if layout == "2016" else [(256, 35), (288, 35), (288, 35)]
    grid_17 = [(736 if layout == "2016" else 768, 17), *[(768, 17)] * 4]
    grid_8 = [(1280, 8), (2048, 8), (2048, 8)]
    assert sizes_of_maps(full(layout), 299) == [(192, 35), *grid_35, *grid_17, *grid_8]


@pytest.mark.parametrize(("size", "sides"), [(32, [7, 3, 1]), (48, [11, 5, 2]), (96, [23, 11, 5])])
def test_the_small_stem_keeps_what_the_usual_one_loses(size: int, sides: list[int]) -> None:
    maps = sizes_of_maps(full(small_input=True), size)
    assert [maps[i][1] for i in (0, 4, 9)] == sides


def test_the_small_stem_has_the_usual_ones_weights() -> None:
    small, usual = full(small_input=True).state_dict(), full().state_dict()
    assert {name: value.shape for name, value in small.items()} == {
        name: value.shape for name, value in usual.items()
    }


def test_the_layouts_differ_as_their_parameter_counts_require() -> None:
    today, of_2016 = shapes("today"), shapes("2016")
    for i, channels in ((0, 32), (1, 64), (2, 64)):
        name = f"mixed.{i}.branch_pool.1.conv.weight"
        assert (today[name][0], of_2016[name][0]) == (channels, 32)
    name = "mixed.7.branch7x7dbl.0.conv.weight"
    assert (today[name][0], of_2016[name][0]) == (192, 160)
    assert not any(name.endswith(("conv.bias", "norm.weight")) for name in today)
    convs = [name for name in of_2016 if name.endswith("conv.weight")]
    assert len(convs) == 94
    for name in convs:
        module = name.removesuffix("conv.weight")
        assert {f"{module}conv.bias", f"{module}norm.weight", f"{module}norm.bias"} <= set(of_2016)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_mixed8_averages_in_2016_and_takes_the_largest_today(layout: Layout) -> None:
    mixed8 = full(layout).mixed[8]
    assert isinstance(mixed8, Branches)
    x = random_map(7, 7)
    pool = F.avg_pool2d if layout == "2016" else F.max_pool2d
    assert torch.equal(mixed8["branch_pool"](x), pool(x, 3, 2))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_norm_follows_the_relu_in_2016_and_precedes_it_today(layout: Layout) -> None:
    torch.manual_seed(0)
    module = ConvNorm(3, Conv(8, 3), width=1.0, layout=layout).eval()
    assert module.norm.running_mean is not None
    nn.init.normal_(module.norm.running_mean)
    x = random_map(5, 5)
    y = module.conv(x)
    expected = module.norm(y.relu()) if layout == "2016" else module.norm(y).relu()
    assert torch.equal(module(x), expected)
    assert (expected < 0).any() == (layout == "2016")


@pytest.mark.parametrize("size", range(1, 10))
@pytest.mark.parametrize("kernel", [1, 3, 5, (1, 7), (7, 1), (1, 3), (3, 1)])
def test_convolutions_pad_as_tensorflow(kernel: int | tuple[int, int], size: int) -> None:
    conv = ConvNorm(3, Conv(8, kernel), width=1.0, layout="today").conv
    window = (kernel, kernel) if isinstance(kernel, int) else kernel
    x = random_map(size, size + 1)
    expected = F.conv2d(naive_same(x, window), conv.weight)
    torch.testing.assert_close(conv(x), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size", range(1, 10))
def test_the_average_is_of_what_is_inside_the_border(size: int) -> None:
    pool = full().mixed[0]["branch_pool"][0]  # type: ignore[index]
    x = random_map(size, size + 1)
    windows = naive_same(x, (3, 3), value=torch.nan).unfold(2, 3, 1).unfold(3, 3, 1)
    torch.testing.assert_close(pool(x), windows.flatten(start_dim=-2).nanmean(dim=-1))


def test_modules_stand_in_the_order_of_the_source() -> None:
    """So that convolution number i of Keras is convolution number i here."""
    convs = [m for m in full().modules() if isinstance(m, nn.Conv2d)]
    start = [(conv.out_channels, conv.kernel_size) for conv in convs[5:12]]
    assert start == [
        (64, (1, 1)), (48, (1, 1)), (64, (5, 5)), (64, (1, 1)), (96, (3, 3)), (96, (3, 3)),
        (32, (1, 1)),
    ]  # fmt: skip
