"""VGG-16 and its separable sibling: layers, heads, padding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from xdist.models.vgg import VGG, vgg16
from xdist.models.xception import SeparableConv


def full(**options: Any) -> VGG:
    with torch.device("meta"):
        return VGG(**{"num_classes": 1000, "separable": True, **options})


def small(**options: Any) -> VGG:
    torch.manual_seed(0)
    return VGG(**{"num_classes": 10, "width": 0.125, "separable": True, **options}).eval()


def images(size: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return 2 * torch.rand(2, 3, size, size, generator=generator) - 1


def test_vgg16_has_13_convolutions_and_3_fully_connected_layers_without_batch_norm() -> None:
    with torch.device("meta"):
        modules = list(vgg16(num_classes=1000).modules())
    assert sum(isinstance(module, nn.Conv2d) for module in modules) == 13
    assert sum(isinstance(module, nn.Linear) for module in modules) == 3
    assert not any(isinstance(module, nn.BatchNorm2d) for module in modules)


def test_the_separable_network_has_one_regular_and_12_separable_convolutions() -> None:
    features = full().features
    assert isinstance(features[0], nn.Sequential)
    assert isinstance(features[0][0], nn.Conv2d)
    assert sum(isinstance(module, SeparableConv) for module in features) == 12
    assert not any(m.bias is not None for m in features.modules() if isinstance(m, nn.Conv2d))


@pytest.mark.parametrize("separable", [True, False])
def test_feature_maps_keep_their_size_but_for_five_pools(separable: bool) -> None:
    features = full(separable=separable).features
    for size, side in ((224, 7), (299, 9), (150, 4), (32, 1)):
        x = features(torch.empty(1, 3, size, size, device="meta"))
        assert x.shape == (1, 512, side, side)


def test_a_pooled_size_of_7_flattens_the_map_of_224_pixels() -> None:
    network = small(pooled_size=7)
    x = network.features(images(224))
    assert torch.equal(network(images(224)), network.classifier(x.flatten(start_dim=1)))


def test_a_pooled_size_of_1_is_the_global_average() -> None:
    network = small()
    x = network.features(images(64))
    expected = network.classifier(x.mean(dim=(2, 3)))
    torch.testing.assert_close(network(images(64)), expected, rtol=1e-5, atol=1e-6)


def test_the_width_for_an_equal_budget_without_fully_connected_layers() -> None:
    """About 3.63 times as wide it has the parameters of Inception V3."""
    num_parameters = sum(parameter.numel() for parameter in full(width=3.63).parameters())
    assert round(num_parameters / 1e6, 2) == 23.49


def test_vgg16_scales_its_fully_connected_layers_too() -> None:
    network = vgg16(num_classes=10, width=0.125)
    assert network.classifier.in_features == 512
    assert network(images(32)).shape == (2, 10)
