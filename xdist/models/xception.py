"""Xception (arXiv 1610.02357, figure 5) and the variants of the paper's ablations.

The graph is that of Keras Applications, whose author is the paper's: 36 convolutional layers in 14
modules, 22,855,952 parameters with 1000 classes. Padding is TensorFlow's for every input size.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from xdist.models.layers import batch_norm, draw_weights, head, scaled

MidActivation = Literal["none", "relu", "elu"]


class Xception(nn.Module):
    """The network.

    images: (N, 3, H, W), float32 in [-1, 1], H and W at least 7
    returned logits: (N, num_classes), float32

    `width`: factor on every channel count, rounded to a multiple of 8.
    `middle_modules`: modules of the middle flow (figure 5: 8).
    `residual`: add to each module its input, through a strided 1x1 convolution where the shape
    changes (section 4.6).
    `mid_activation`: between the spatial and the pointwise convolution (figure 10).
    `segments`: channel groups of a spatial convolution (section 1.2): 1 is a regular 3x3
    convolution, None is one a channel; groups differ by one channel where it does not divide, and
    there are never more than channels.
    `fc`: units of fully connected layers before the classifier, a ReLU after each (table 2:
    4096, 4096).
    `dropout`: rate before the classifier (section 4.3: 0.5 for ImageNet).
    `head_bias`: start of the classifier's bias.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        width: float = 1.0,
        middle_modules: int = 8,
        residual: bool = True,
        mid_activation: MidActivation = "none",
        segments: int | None = None,
        fc: tuple[int, ...] = (),
        dropout: float = 0.0,
        head_bias: float = 0.0,
    ) -> None:
        super().__init__()
        self.head_bias = head_bias
        separable = functools.partial(
            SeparableConv, segments=segments, mid_activation=mid_activation
        )
        module = functools.partial(Module, separable=separable, residual=residual)
        c32, c64, c128, c256, c728, c1024, c1536, c2048 = (
            scaled(channels, width) for channels in (32, 64, 128, 256, 728, 1024, 1536, 2048)
        )
        self.stem = nn.Sequential(
            nn.Conv2d(3, c32, 3, stride=2, bias=False), batch_norm(c32), nn.ReLU(inplace=True),
            nn.Conv2d(c32, c64, 3, bias=False), batch_norm(c64), nn.ReLU(inplace=True),
        )  # fmt: skip
        self.entry_flow = nn.Sequential(
            module((c64, c128, c128), stride=2, leading_relu=False),  # the stem ends with one
            module((c128, c256, c256), stride=2),
            module((c256, c728, c728), stride=2),
        )
        self.middle_flow = nn.Sequential(
            *(module((c728, c728, c728, c728), stride=1) for _ in range(middle_modules))
        )
        self.exit_flow = nn.Sequential(
            module((c728, c728, c1024), stride=2),
            separable(c1024, c1536), nn.ReLU(inplace=True),
            separable(c1536, c2048), nn.ReLU(inplace=True),
        )  # fmt: skip
        self.fc, self.dropout, self.classifier = head(
            c2048, fc=fc, dropout=dropout, num_classes=num_classes
        )
        self.initialize(None)

    def initialize(self, generator: torch.Generator | None) -> None:
        """Draw all weights anew; None draws them from torch's global generator."""
        draw_weights(self, generator)
        nn.init.constant_(self.classifier.bias, self.head_bias)

    def forward(self, images: Tensor) -> Tensor:
        x = self.exit_flow(self.middle_flow(self.entry_flow(self.stem(images))))
        logits: Tensor = self.classifier(self.dropout(self.fc(x.mean(dim=(2, 3)))))
        return logits


class Module(nn.Module):
    """Separable convolutions with a ReLU before each, and the input added to their result.

    A strided module ends with a max pool. `channels`: of the input and after every convolution.
    Without `leading_relu` the first convolution has none.
    """

    def __init__(
        self,
        channels: tuple[int, ...],
        *,
        separable: Callable[[int, int], SeparableConv],
        stride: Literal[1, 2],
        leading_relu: bool = True,
        residual: bool,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for i, (channels_in, channels_out) in enumerate(itertools.pairwise(channels)):
            if i > 0 or leading_relu:
                layers.append(nn.ReLU(inplace=i > 0))  # the leading one must leave the skip's input
            layers.append(separable(channels_in, channels_out))
        self.layers = nn.Sequential(*layers)
        self.stride = stride
        self.skip: nn.Module | None = None
        if residual and stride == 2:
            conv = nn.Conv2d(channels[0], channels[-1], 1, stride=2, bias=False)
            self.skip = nn.Sequential(conv, batch_norm(channels[-1]))
        elif residual:
            self.skip = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layers(x)
        if self.stride == 2:
            y = max_pool_same(y)
        return y if self.skip is None else y.add_(self.skip(x))


class SeparableConv(nn.Module):
    """Spatial 3x3 convolution of channel groups, then 1x1 convolution, then batch norm."""

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        *,
        segments: int | None,
        mid_activation: MidActivation,
    ) -> None:
        super().__init__()
        activations = {"none": nn.Identity, "relu": nn.ReLU, "elu": nn.ELU}
        self.spatial = spatial_conv(channels_in, segments=segments)
        self.mid_activation = activations[mid_activation]()
        self.pointwise = nn.Conv2d(channels_in, channels_out, 1, bias=False)
        self.norm = batch_norm(channels_out)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(self.pointwise(self.mid_activation(self.spatial(x))))
        return y


def spatial_conv(channels: int, *, segments: int | None) -> nn.Module:
    """A 3x3 convolution in which `segments` even groups of channels are mixed, each in itself."""
    segments = channels if segments is None else min(segments, channels)
    size, num_larger = divmod(channels, segments)
    if num_larger == 0:
        return nn.Conv2d(channels, channels, 3, padding=1, groups=segments, bias=False)
    return UnevenConv((size + 1, num_larger), (size, segments - num_larger))


class UnevenConv(nn.Module):
    """A grouped 3x3 convolution of two group sizes; `larger`, `smaller`: (channels, groups)."""

    def __init__(self, larger: tuple[int, int], smaller: tuple[int, int]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(
            nn.Conv2d(size * groups, size * groups, 3, padding=1, groups=groups, bias=False)
            for size, groups in (larger, smaller)
        )
        self.channels = [size * groups for size, groups in (larger, smaller)]

    def forward(self, x: Tensor) -> Tensor:
        pieces = torch.split(x, self.channels, dim=1)
        return torch.cat(
            [part(piece) for part, piece in zip(self.parts, pieces, strict=True)], dim=1
        )


def max_pool_same(x: Tensor) -> Tensor:
    """TensorFlow's 3x3 max pool of stride 2 with padding "same".

    It pads both sides where the size is odd, and the right and lower side alone where it is even:
    there `ceil_mode` lets the last window reach over the border.
    """
    height, width = x.shape[-2:]
    return F.max_pool2d(x, 3, stride=2, padding=(height % 2, width % 2), ceil_mode=True)
