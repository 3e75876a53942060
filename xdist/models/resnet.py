"""ResNet-50, -101 and -152 (arXiv 1512.03385, table 1) in Keras Applications' layout.

With 1000 classes they have 25,583,592, 44,601,832 and 60,268,520 parameters; without the biases of
the convolutions 25,557,032, 44,549,160 and 60,192,808, as many as torchvision's. A module that
halves the feature map does it in its first convolution, as in the paper of ResNet (torchvision: in
its second).
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

from xdist.models.layers import batch_norm, draw_weights, head, scaled

BATCH_NORM_EPSILON = 1.001e-5  # Keras Applications
STAGE_CHANNELS = (64, 128, 256, 512)
EXPANSION = 4


class ResNet(nn.Module):
    """The network.

    images: (N, 3, H, W), float32 in [-1, 1], H and W at least 1
    returned logits: (N, num_classes), float32

    `num_modules`: in each of the four stages; only the first stage's first has stride 1.
    `width`: factor on every channel count, rounded to a multiple of 8.
    `conv_bias`: the convolutions have a bias.
    `fc`: units of fully connected layers before the classifier, a ReLU after each.
    `dropout`: rate before the classifier.
    `head_bias`: start of the classifier's bias.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        num_modules: tuple[int, int, int, int],
        width: float = 1.0,
        conv_bias: bool = True,
        fc: tuple[int, ...] = (),
        dropout: float = 0.0,
        head_bias: float = 0.0,
    ) -> None:
        super().__init__()
        self.head_bias = head_bias
        channels = scaled(64, width)
        self.stem = nn.Sequential(
            *conv_norm(3, channels, kernel=7, stride=2, bias=conv_bias),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, stride=2, padding=1),
        )
        self.stages = nn.Sequential()
        for stage, (full, modules) in enumerate(zip(STAGE_CHANNELS, num_modules, strict=True)):
            inner = scaled(full, width)
            for i in range(modules):
                stride = 2 if stage > 0 and i == 0 else 1
                self.stages.append(Bottleneck(channels, inner, stride=stride, bias=conv_bias))
                channels = EXPANSION * inner
        self.fc, self.dropout, self.classifier = head(
            channels, fc=fc, dropout=dropout, num_classes=num_classes
        )
        self.initialize(None)

    def initialize(self, generator: torch.Generator | None) -> None:
        """Draw all weights anew; None draws them from torch's global generator."""
        draw_weights(self, generator)
        nn.init.constant_(self.classifier.bias, self.head_bias)

    def forward(self, images: Tensor) -> Tensor:
        x = self.stages(self.stem(images))
        logits: Tensor = self.classifier(self.dropout(self.fc(x.mean(dim=(2, 3)))))
        return logits


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions, and the input added to their result before the last ReLU.

    `inner`: channels of the first two; the third has `EXPANSION` times as many.
    """

    def __init__(self, channels_in: int, inner: int, *, stride: int, bias: bool) -> None:
        super().__init__()
        channels = EXPANSION * inner
        self.layers = nn.Sequential(
            *conv_norm(channels_in, inner, kernel=1, stride=stride, bias=bias),
            nn.ReLU(inplace=True),
            *conv_norm(inner, inner, kernel=3, bias=bias),
            nn.ReLU(inplace=True),
            *conv_norm(inner, channels, kernel=1, bias=bias),
        )
        self.skip: nn.Module = nn.Identity()
        if channels_in != channels or stride > 1:
            self.skip = nn.Sequential(
                *conv_norm(channels_in, channels, kernel=1, stride=stride, bias=bias)
            )

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layers(x)
        return y.add_(self.skip(x)).relu_()


def conv_norm(
    channels_in: int, channels: int, *, kernel: int, stride: int = 1, bias: bool
) -> tuple[nn.Conv2d, nn.BatchNorm2d]:
    """A convolution that pads both sides by half its kernel, and its batch norm."""
    padding = kernel // 2
    conv = nn.Conv2d(channels_in, channels, kernel, stride, padding, bias=bias)
    return conv, batch_norm(channels, epsilon=BATCH_NORM_EPSILON)


resnet50 = functools.partial(ResNet, num_modules=(3, 4, 6, 3))
resnet101 = functools.partial(ResNet, num_modules=(3, 4, 23, 3))
resnet152 = functools.partial(ResNet, num_modules=(3, 8, 36, 3))
