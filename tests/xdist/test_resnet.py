"""The ResNets: depth, sizes, where they stride, and what their modules add."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from xdist.models import MODELS
from xdist.models.resnet import Bottleneck, ResNet, resnet50


def full(name: str = "resnet50", **options: Any) -> ResNet:
    with torch.device("meta"):
        network = MODELS[name](num_classes=1000, **options)
    assert isinstance(network, ResNet)
    return network


@pytest.mark.parametrize("depth", [50, 101, 152])
def test_a_network_has_as_many_layers_as_its_name_says(depth: int) -> None:
    layers = [
        name
        for name, module in full(f"resnet{depth}").named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear) and ".skip." not in name
    ]
    assert len(layers) == depth


@pytest.mark.parametrize(("size", "sides"), [(224, [56, 28, 14, 7]), (299, [75, 38, 19, 10])])
def test_feature_maps_have_the_published_sizes(size: int, sides: list[int]) -> None:
    network = full()
    x = network.stem(torch.empty(1, 3, size, size, device="meta"))
    seen = []
    for module in network.stages:
        x = module(x)
        seen.append((x.shape[1], x.shape[2]))
    expected = zip((256, 512, 1024, 2048), sides, strict=True)
    assert list(dict.fromkeys(seen)) == list(expected)


def test_only_the_first_module_of_a_stage_projects_and_strides_in_its_first_convolution() -> None:
    for i, module in enumerate(full().stages):
        assert isinstance(module, Bottleneck)
        assert isinstance(module.skip, nn.Sequential) == (i in (0, 3, 7, 13))
        strides = [conv.stride[0] for conv in module.layers if isinstance(conv, nn.Conv2d)]
        assert strides == [2 if i in (3, 7, 13) else 1, 1, 1]


@pytest.mark.parametrize("conv_bias", [True, False])
def test_conv_bias_is_that_of_every_convolution(conv_bias: bool) -> None:
    convs = [m for m in full(conv_bias=conv_bias).modules() if isinstance(m, nn.Conv2d)]
    assert {conv.bias is not None for conv in convs} == {conv_bias}


def test_a_module_adds_its_input_before_the_last_relu() -> None:
    torch.manual_seed(0)
    module = Bottleneck(32, 8, stride=1, bias=True).eval()
    x = torch.randn(2, 32, 5, 5)
    given = x.clone()
    assert torch.equal(module(x), (module.layers(given) + given).relu())
    assert torch.equal(x, given)


@pytest.mark.parametrize("size", [1, 31, 32, 33])
def test_small_and_odd_inputs_work(size: int) -> None:
    network = resnet50(num_classes=10, width=0.125).eval()
    assert network(torch.ones(2, 3, size, size)).shape == (2, 10)
