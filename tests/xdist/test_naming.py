"""Foreign names of our weights: the right weight, the right axes, each weight once."""

from __future__ import annotations

import itertools
from typing import Literal

import pytest
import torch

from xdist.models.inception_v3 import InceptionV3
from xdist.models.xception import Xception
from xdist.naming import KERAS, TIMM, XDIST, Place, namings

TIMM_NAMES = {
    "conv1.weight": "stem.0.weight",
    "bn1.running_mean": "stem.1.running_mean",
    "conv2.weight": "stem.3.weight",
    "bn2.bias": "stem.4.bias",
    "block1.skip.weight": "entry_flow.0.skip.0.weight",
    "block1.skipbn.running_var": "entry_flow.0.skip.1.running_var",
    "block1.rep.0.conv1.weight": "entry_flow.0.layers.0.spatial.weight",
    "block1.rep.0.pointwise.weight": "entry_flow.0.layers.0.pointwise.weight",
    "block1.rep.1.weight": "entry_flow.0.layers.0.norm.weight",
    "block1.rep.3.conv1.weight": "entry_flow.0.layers.2.spatial.weight",
    "block1.rep.4.bias": "entry_flow.0.layers.2.norm.bias",
    "block3.rep.1.conv1.weight": "entry_flow.2.layers.1.spatial.weight",
    "block3.rep.2.weight": "entry_flow.2.layers.1.norm.weight",
    "block3.rep.4.pointwise.weight": "entry_flow.2.layers.3.pointwise.weight",
    "block3.rep.5.running_mean": "entry_flow.2.layers.3.norm.running_mean",
    "block4.rep.7.conv1.weight": "middle_flow.0.layers.5.spatial.weight",
    "block11.rep.8.running_var": "middle_flow.7.layers.5.norm.running_var",
    "block12.skip.weight": "exit_flow.0.skip.0.weight",
    "block12.rep.4.conv1.weight": "exit_flow.0.layers.3.spatial.weight",
    "conv3.conv1.weight": "exit_flow.1.spatial.weight",
    "bn3.bias": "exit_flow.1.norm.bias",
    "conv4.pointwise.weight": "exit_flow.3.pointwise.weight",
    "bn4.running_mean": "exit_flow.3.norm.running_mean",
    "fc.bias": "classifier.bias",
}
"""From `legacy_xception` of timm 1.0.31, every kind of place once."""

KERAS_NAMES = {
    "layers/conv2d/vars/0": "stem.0.weight",
    "layers/conv2d_1/vars/0": "stem.3.weight",
    "layers/conv2d_2/vars/0": "entry_flow.0.skip.0.weight",
    "layers/conv2d_5/vars/0": "exit_flow.0.skip.0.weight",
    "layers/separable_conv2d/vars/0": "entry_flow.0.layers.0.spatial.weight",
    "layers/separable_conv2d_1/vars/1": "entry_flow.0.layers.2.pointwise.weight",
    "layers/separable_conv2d_33/vars/0": "exit_flow.3.spatial.weight",
    "layers/batch_normalization/vars/0": "stem.1.weight",
    "layers/batch_normalization_3/vars/1": "entry_flow.0.layers.2.norm.bias",
    "layers/batch_normalization_4/vars/2": "entry_flow.0.skip.1.running_mean",
    "layers/batch_normalization_39/vars/3": "exit_flow.3.norm.running_var",
    "layers/dense/vars/0": "classifier.weight",
}

KERAS_CONVOLUTIONS = {
    4: "stem.5",
    5: "mixed.0.branch3x3dbl.0",
    6: "mixed.0.branch5x5.0",
    7: "mixed.0.branch3x3dbl.1",
    8: "mixed.0.branch1x1.0",
    9: "mixed.0.branch5x5.1",
    10: "mixed.0.branch3x3dbl.2",
    11: "mixed.0.branch_pool.1",
    85: "mixed.10.branch3x3dbl.0",
    86: "mixed.10.branch3x3.0",
    87: "mixed.10.branch3x3dbl.1",
    88: "mixed.10.branch3x3.1.branch1x3.0",
    89: "mixed.10.branch3x3.1.branch3x1.0",
    90: "mixed.10.branch3x3dbl.2.branch1x3.0",
    91: "mixed.10.branch3x3dbl.2.branch3x1.0",
    92: "mixed.10.branch1x1.0",
    93: "mixed.10.branch_pool.1",
}
"""Inception V3: number of the Conv2D, and of its BatchNormalization -> module."""


@pytest.fixture(scope="module")
def xception() -> Xception:
    with torch.device("meta"):
        return Xception(num_classes=10, width=0.1)


def test_timm_names(xception: Xception) -> None:
    names = {name: place.name for name, place in namings(xception)[TIMM].items()}
    assert {name: names[name] for name in TIMM_NAMES} == TIMM_NAMES


def test_keras_names(xception: Xception) -> None:
    names = {name: place.name for name, place in namings(xception)[KERAS].items()}
    assert {name: names[name] for name in KERAS_NAMES} == KERAS_NAMES


@pytest.mark.parametrize("layout", ["today", "2016"])
def test_keras_sorts_inception_v3_by_distance(layout: Literal["today", "2016"]) -> None:
    with torch.device("meta"):
        network = InceptionV3(num_classes=10, width=0.1, layout=layout)
    names = {name: place.name for name, place in namings(network)[KERAS].items()}
    assert sorted(names.values()) == sorted(namings(network)[XDIST])
    norm_vectors = (["weight"] if layout == "2016" else []) + [
        "bias",
        "running_mean",
        "running_var",
    ]
    for number, module in KERAS_CONVOLUTIONS.items():
        assert names[f"layers/conv2d_{number}/vars/0"] == f"{module}.conv.weight"
        for i, vector in enumerate(norm_vectors):
            variable = f"layers/batch_normalization_{number}/vars/{i}"
            assert names[variable] == f"{module}.norm.{vector}"
    assert "layers/conv2d_94/vars/0" not in names


def test_every_naming_has_each_weight_once(xception: Xception) -> None:
    ours = sorted(namings(xception)[XDIST])
    assert len(ours) == 74 + 40 * 4 + 2  # convolutions, batch norms, classifier
    for naming in (namings(xception)[TIMM], namings(xception)[KERAS]):
        assert sorted(place.name for place in naming.values()) == ours


@pytest.mark.parametrize("axes", [None, *itertools.permutations(range(4))])
def test_a_tensor_comes_back_from_the_foreign_order(axes: tuple[int, ...] | None) -> None:
    place = Place("weight", axes)
    tensor = torch.arange(120.0).view(2, 3, 4, 5)
    assert torch.equal(place.ours(place.foreign(tensor)), tensor)


def test_keras_has_height_and_width_first(xception: Xception) -> None:
    naming, state = namings(xception)[KERAS], xception.state_dict()
    shapes = {name: tuple(place.foreign(state[place.name]).shape) for name, place in naming.items()}
    assert shapes["layers/conv2d/vars/0"] == (3, 3, 3, 8)
    assert shapes["layers/separable_conv2d_1/vars/0"] == (3, 3, 16, 1)
    assert shapes["layers/dense/vars/0"] == (208, 10)


@pytest.mark.parametrize("segments", [1, 3, 64])
def test_keras_has_no_segments(segments: int) -> None:
    with torch.device("meta"):
        network = Xception(num_classes=10, width=0.1, segments=segments)
    assert namings(network).keys() == {XDIST, TIMM}
