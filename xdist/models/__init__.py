"""The networks, by the names that the configuration gives them."""

from __future__ import annotations

import torch

from xdist.config import ModelConfig
from xdist.models.xception import Xception

MODELS = {"xception": Xception}


def build_model(
    config: ModelConfig,
    *,
    num_classes: int,
    head_bias: float,
    seed: int,
) -> Xception:
    """The network, on the CPU, with weights that depend on `seed` and the arguments alone.

    `head_bias` starts the classifier's bias: 0 for softmax, about -ln(num_classes) for a sigmoid
    loss over rare labels.
    """
    with torch.device("meta"):  # draws nothing: the weights are drawn once, below
        model = MODELS[config.name](
            num_classes=num_classes,
            width=config.width,
            middle_modules=config.middle_modules,
            residual=config.residual,
            mid_activation=config.mid_activation,
            segments=config.segments,
            fc=config.fc,
            dropout=config.dropout,
            head_bias=head_bias,
        )
    model.to_empty(device="cpu")
    model.initialize(torch.Generator().manual_seed(seed))
    return model
