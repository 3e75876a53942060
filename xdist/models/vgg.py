"""VGG-16 (arXiv 1409.1556, table 1, D), and the same network of separable convolutions.

The latter is the Xception paper's (section 4.6) "VGG-style" network without residual connections.
The paper gives no layout; this one keeps VGG-16's: all but its first convolution are depthwise
separable, and a batch norm in the place of the bias follows each.

Parameters with 1000 classes: VGG-16 138,357,544; separable 2,190,888, with two layers of 4096 after
the global average 24,657,448, after a 7 x 7 map 125,320,744.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from xdist.models.layers import batch_norm, draw_weights, head, scaled
from xdist.models.xception import SeparableConv

STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


class VGG(nn.Module):
    """The network.

    images: (N, 3, H, W), float32 in [-1, 1], H and W at least 32
    returned logits: (N, num_classes), float32

    `separable`: see the module; without it, convolutions have a bias and no batch norm.
    `width`: factor on every channel count, rounded to a multiple of 8.
    `pooled_size`: rows and columns that the last feature map is averaged to before it is flattened.
    1 is a global average; 7 changes nothing at 224 pixels, where the map has as many.
    `fc`: units of fully connected layers before the classifier, a ReLU after each.
    `dropout`: rate before the classifier.
    `head_bias`: start of the classifier's bias.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        separable: bool,
        width: float = 1.0,
        pooled_size: int = 1,
        fc: tuple[int, ...] = (),
        dropout: float = 0.0,
        head_bias: float = 0.0,
    ) -> None:
        super().__init__()
        self.head_bias = head_bias
        self.separable = separable
        self.pooled_size = pooled_size
        self.features = nn.Sequential()
        channels = 3
        for stage in STAGES:
            for channels_out in (scaled(full, width) for full in stage):
                conv = separable_conv if separable else plain_conv
                self.features.extend([conv(channels, channels_out), nn.ReLU(inplace=True)])
                channels = channels_out
            self.features.append(nn.MaxPool2d(2))
        self.fc, self.dropout, self.classifier = head(
            channels * pooled_size**2, fc=fc, dropout=dropout, num_classes=num_classes
        )
        self.initialize(None)

    def initialize(self, generator: torch.Generator | None) -> None:
        """Draw all weights anew; None draws them from torch's global generator."""
        draw_weights(self, generator, nonlinearity="linear" if self.separable else "relu")
        nn.init.constant_(self.classifier.bias, self.head_bias)

    def forward(self, images: Tensor) -> Tensor:
        x = F.adaptive_avg_pool2d(self.features(images), self.pooled_size)
        logits: Tensor = self.classifier(self.dropout(self.fc(x.flatten(start_dim=1))))
        return logits


def vgg16(
    *, num_classes: int, width: float = 1.0, dropout: float = 0.0, head_bias: float = 0.0
) -> VGG:
    """VGG-16 as published: two layers of 4096, which `width` scales too, on a 7 x 7 map."""
    units = scaled(4096, width)
    return VGG(
        num_classes=num_classes,
        separable=False,
        width=width,
        pooled_size=7,
        fc=(units, units),
        dropout=dropout,
        head_bias=head_bias,
    )


def plain_conv(channels_in: int, channels_out: int) -> nn.Module:
    return nn.Conv2d(channels_in, channels_out, 3, padding=1)


def separable_conv(channels_in: int, channels_out: int) -> nn.Module:
    """With batch norm; from the three colours it is a regular convolution, as in Xception."""
    if channels_in == 3:
        conv = nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False)
        return nn.Sequential(conv, batch_norm(channels_out))
    return SeparableConv(channels_in, channels_out, segments=None, mid_activation="none")
