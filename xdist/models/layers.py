"""What several networks are built of: batch norm, the head, channel counts, initial weights."""

from __future__ import annotations

import itertools
from typing import Literal

import torch
from torch import nn

BATCH_NORM_EPSILON = 1e-3  # Keras Applications since 2a0b112d08 (2016-12-12)
BATCH_NORM_MOMENTUM = 0.01  # Keras Applications: 0.99, the share that is kept


def scaled(channels: int, width: float) -> int:
    """Channels at that width: a multiple of 8, so that parts of the flat vector stay aligned."""
    return max(8, 8 * round(channels * width / 8))


def batch_norm(
    channels: int, *, epsilon: float = BATCH_NORM_EPSILON, scale: bool = True
) -> nn.BatchNorm2d:
    """Without `scale` it has no gamma: `weight` is None, and no parameter."""
    norm = nn.BatchNorm2d(channels, eps=epsilon, momentum=BATCH_NORM_MOMENTUM)
    if not scale:
        norm.register_parameter("weight", None)
    return norm


def head(
    features: int, *, fc: tuple[int, ...], dropout: float, num_classes: int
) -> tuple[nn.Sequential, nn.Dropout, nn.Linear]:
    """(fully connected layers with a ReLU after each, dropout, classifier), to be applied in turn.

    They are handed out singly so that every network calls its weights `fc.0.weight` and so on, and
    `classifier.weight`.
    """
    layers = nn.Sequential()
    for units_in, units in itertools.pairwise((features, *fc)):
        layers.extend([nn.Linear(units_in, units), nn.ReLU(inplace=True)])
    return layers, nn.Dropout(dropout), nn.Linear((features, *fc)[-1], num_classes)


def draw_weights(
    network: nn.Module,
    generator: torch.Generator | None,
    *,
    nonlinearity: Literal["linear", "relu"] = "linear",
) -> None:
    """Draw all weights anew; None draws them from torch's global generator.

    The paper names no initialiser. Convolutions are normal with variance 1 / fan-in where a batch
    norm follows each (linear), twice that where a ReLU does; fully connected layers are
    Glorot-uniform, and biases zero, as in Keras.
    """
    if next(network.parameters()).is_meta:
        return  # There is nothing to draw; torch would import its compiler for it, in a second.
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity=nonlinearity, generator=generator)
        elif isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight, generator=generator)
        elif isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            if module.weight is not None:
                nn.init.ones_(module.weight)
        if isinstance(module, nn.Conv2d | nn.Linear | nn.BatchNorm2d) and module.bias is not None:
            nn.init.zeros_(module.bias)
