"""The networks, by the names that the configuration gives them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import torch
from torch import nn

from xdist.model_config import ModelConfig
from xdist.models.inception_v3 import InceptionV3
from xdist.models.resnet import ResNet, resnet50, resnet101, resnet152
from xdist.models.vgg import VGG, vgg16
from xdist.models.xception import Xception

Network = Xception | InceptionV3 | VGG | ResNet

MODELS: Mapping[str, Callable[..., Network]] = {
    "xception": Xception,
    "inception_v3": InceptionV3,
    "vgg_separable": functools.partial(VGG, separable=True),
    "vgg16": vgg16,
    "resnet50": resnet50,
    "resnet101": resnet101,
    "resnet152": resnet152,
}


def build_model(
    config: ModelConfig,
    *,
    num_classes: int,
    head_bias: float,
    seed: int,
) -> Network:
    """The network, on the CPU, with weights that depend on `seed` and the arguments alone.

    `head_bias` starts the classifier's bias: 0 for softmax, about -ln(num_classes) for a sigmoid
    loss over rare labels.
    """
    with torch.device("meta"):  # draws nothing: the weights are drawn once, below
        model = MODELS[config.name](
            num_classes=num_classes, head_bias=head_bias, **config.options()
        )
    _materialize(model)
    model.initialize(torch.Generator().manual_seed(seed))
    return model


def _materialize(model: nn.Module) -> None:
    """What `model.to_empty(device="cpu")` does, without the second that it needs to import sympy
    (torch 2.13).
    """
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            empty = torch.empty(parameter.shape, dtype=parameter.dtype)
            setattr(module, name, nn.Parameter(empty))
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype))
