"""Inception V3 (arXiv 1512.00567) without its auxiliary tower, in two layouts.

"today" is Keras Applications' and TF-slim's: 23,817,352 parameters with 1000 classes. "2016" is the
Keras network whose 23,626,728 the Xception paper's table 3 prints (Keras f23f2ff2c9, 2016-08-27, to
eaa827584f, 2017-03-10). It differs in the pool projections of mixed1 and mixed2 (32 channels
instead of 64), in the first convolution of mixed7's longest branch (160 instead of 192), in the
pool of mixed8 (average instead of max), and in every convolution: it has a bias, its batch norm has
a gamma, and its ReLU comes before the batch norm.

Modules and branches bear Keras' names and stand in Keras' order. Padding is TensorFlow's for every
input size: whatever is padded "same" has stride 1 and an odd window, so both sides get the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from xdist.models.layers import batch_norm, draw_weights, head, scaled

Layout = Literal["today", "2016"]
Padding = Literal["same", "valid"]


@dataclass(frozen=True)
class Conv:
    """A convolution to be built; `kernel`: rows and columns, or the one number of both."""

    channels: int
    kernel: int | tuple[int, int]
    stride: int = 1
    padding: Padding = "same"


Step = Conv | nn.Module | dict[str, list["Step"]]
"""A convolution, a pool, or branches whose results are concatenated."""


class InceptionV3(nn.Module):
    """The network.

    images: (N, 3, H, W), float32 in [-1, 1], H and W at least 75, or 31 with `small_input`
    returned logits: (N, num_classes), float32

    `width`: factor on every channel count, rounded to a multiple of 8.
    `layout`: see the module.
    `small_input`: the stem's convolutions have stride 1 and padding "same". The weights stay the
    same, and 32 pixels arrive at mixed0 as 7 x 7, where 75 do otherwise.
    `fc`: units of fully connected layers before the classifier, a ReLU after each (Xception paper,
    table 2: 4096, 4096).
    `dropout`: rate before the classifier.
    `head_bias`: start of the classifier's bias.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        width: float = 1.0,
        layout: Layout = "today",
        small_input: bool = False,
        fc: tuple[int, ...] = (),
        dropout: float = 0.0,
        head_bias: float = 0.0,
    ) -> None:
        super().__init__()
        self.head_bias = head_bias
        self.stem = Chain(3, stem(small_input=small_input), width=width, layout=layout)
        channels = self.stem.channels
        self.mixed = nn.Sequential()
        for branches in inception_modules(layout):
            module = Branches(channels, branches, width=width, layout=layout)
            channels = module.channels
            self.mixed.append(module)
        self.fc, self.dropout, self.classifier = head(
            channels, fc=fc, dropout=dropout, num_classes=num_classes
        )
        self.initialize(None)

    def initialize(self, generator: torch.Generator | None) -> None:
        """Draw all weights anew; None draws them from torch's global generator."""
        draw_weights(self, generator)
        nn.init.constant_(self.classifier.bias, self.head_bias)

    def forward(self, images: Tensor) -> Tensor:
        x = self.mixed(self.stem(images))
        logits: Tensor = self.classifier(self.dropout(self.fc(x.mean(dim=(2, 3)))))
        return logits


def stem(*, small_input: bool) -> list[Step]:
    padding: Padding = "same" if small_input else "valid"
    return [
        Conv(32, 3, stride=1 if small_input else 2, padding=padding),
        Conv(32, 3, padding=padding),
        Conv(64, 3),
        nn.MaxPool2d(3, stride=2),
        Conv(80, 1),
        Conv(192, 3, padding=padding),
        nn.MaxPool2d(3, stride=2),
    ]


def inception_modules(layout: Layout) -> list[dict[str, list[Step]]]:
    """mixed0 to mixed10."""
    is_2016 = layout == "2016"
    pool_channels = 32 if is_2016 else 64
    return [
        grid_35(pool_channels=32),
        grid_35(pool_channels=pool_channels),
        grid_35(pool_channels=pool_channels),
        {
            "branch3x3": [reducing(384)],
            "branch3x3dbl": [Conv(64, 1), Conv(96, 3), reducing(96)],
            "branch_pool": [nn.MaxPool2d(3, stride=2)],
        },
        grid_17(128, first_of_double=128),
        grid_17(160, first_of_double=160),
        grid_17(160, first_of_double=160),
        grid_17(192, first_of_double=160 if is_2016 else 192),
        {
            "branch3x3": [Conv(192, 1), reducing(320)],
            "branch7x7x3": [Conv(192, 1), Conv(192, (1, 7)), Conv(192, (7, 1)), reducing(192)],
            "branch_pool": [nn.AvgPool2d(3, stride=2) if is_2016 else nn.MaxPool2d(3, stride=2)],
        },
        grid_8(),
        grid_8(),
    ]


def grid_35(*, pool_channels: int) -> dict[str, list[Step]]:
    """Figure 5 of arXiv 1512.00567, on 35 x 35 at 299 pixels."""
    return {
        "branch1x1": [Conv(64, 1)],
        "branch5x5": [Conv(48, 1), Conv(64, 5)],
        "branch3x3dbl": [Conv(64, 1), Conv(96, 3), Conv(96, 3)],
        "branch_pool": [average_pool_same(), Conv(pool_channels, 1)],
    }


def grid_17(channels: int, *, first_of_double: int) -> dict[str, list[Step]]:
    """Figure 6, on 17 x 17."""
    rows, columns = (7, 1), (1, 7)
    return {
        "branch1x1": [Conv(192, 1)],
        "branch7x7": [Conv(channels, 1), Conv(channels, columns), Conv(192, rows)],
        "branch7x7dbl": [
            Conv(first_of_double, 1),
            Conv(channels, rows),
            Conv(channels, columns),
            Conv(channels, rows),
            Conv(192, columns),
        ],
        "branch_pool": [average_pool_same(), Conv(192, 1)],
    }


def grid_8() -> dict[str, list[Step]]:
    """Figure 7, on 8 x 8."""
    fork: dict[str, list[Step]] = {
        "branch1x3": [Conv(384, (1, 3))],
        "branch3x1": [Conv(384, (3, 1))],
    }
    return {
        "branch1x1": [Conv(320, 1)],
        "branch3x3": [Conv(384, 1), fork],
        "branch3x3dbl": [Conv(448, 1), Conv(384, 3), fork],
        "branch_pool": [average_pool_same(), Conv(192, 1)],
    }


def reducing(channels: int) -> Conv:
    return Conv(channels, 3, stride=2, padding="valid")


def average_pool_same() -> nn.AvgPool2d:
    """TensorFlow's 3x3 average of stride 1 with padding "same": of what is inside the border."""
    return nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False)


class Branches(nn.ModuleDict):
    """Chains on one input, whose results are concatenated; `channels`: of the result."""

    def __init__(
        self, channels_in: int, branches: dict[str, list[Step]], *, width: float, layout: Layout
    ) -> None:
        chains = {
            name: Chain(channels_in, steps, width=width, layout=layout)
            for name, steps in branches.items()
        }
        super().__init__(chains)
        self.channels = sum(chain.channels for chain in chains.values())

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in self.values()], dim=1)


class Chain(nn.Sequential):
    """Steps in turn; `channels`: of the result."""

    def __init__(
        self, channels_in: int, steps: list[Step], *, width: float, layout: Layout
    ) -> None:
        super().__init__()
        self.channels = channels_in
        module: ConvNorm | Branches
        for step in steps:
            match step:
                case nn.Module():
                    self.append(step)
                    continue
                case Conv():
                    module = ConvNorm(self.channels, step, width=width, layout=layout)
                case branches:
                    module = Branches(self.channels, branches, width=width, layout=layout)
            self.append(module)
            self.channels = module.channels


class ConvNorm(nn.Module):
    """A convolution with batch norm and ReLU, which in the layout of 2016 comes before the norm."""

    def __init__(self, channels_in: int, conv: Conv, *, width: float, layout: Layout) -> None:
        super().__init__()
        self.channels = scaled(conv.channels, width)
        self.is_2016 = layout == "2016"
        self.conv = nn.Conv2d(
            channels_in, self.channels, conv.kernel, conv.stride, conv.padding, bias=self.is_2016
        )
        self.norm = batch_norm(self.channels, scale=self.is_2016)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        y: Tensor = self.norm(self.relu(x)) if self.is_2016 else self.relu(self.norm(x))
        return y
