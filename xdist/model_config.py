"""ModelConfig: which network is trained."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, Final, Literal

from datapipe.checks import check, check_least, check_types

MODEL_OPTIONS: Final = {
    "xception": ("fc", "middle_modules", "residual", "mid_activation", "segments"),
    "inception_v3": ("fc", "layout", "small_input"),
    "vgg_separable": ("fc", "pooled_size"),
    "vgg16": (),
    "resnet50": ("fc", "conv_bias"),
    "resnet101": ("fc", "conv_bias"),
    "resnet152": ("fc", "conv_bias"),
}
"""The networks, and which fields of `ModelConfig` each has besides those that all have."""
MODEL_NAMES = tuple(MODEL_OPTIONS)
MOST: Final = {"num_classes": 10_000_000, "middle_modules": 1000, "pooled_size": 64}
MOST_LAYERS, MOST_UNITS = 16, 1_000_000
"""Of `fc`. Beyond them a mistaken number would take all memory before anybody sees it."""
LEAST_IMAGE_SIZES: Final = {"xception": 7, "inception_v3": 75, "vgg_separable": 32, "vgg16": 32}


@dataclass(frozen=True)
class ModelConfig:
    """Which network is trained."""

    name: str = "xception"
    """The network: xception, inception_v3, vgg_separable (the VGG-style network without residual
    connections of the paper's section 4.6), vgg16, resnet50, resnet101 or resnet152. A field that
    it does not have keeps its default.
    """
    num_classes: int | None = None
    """Outputs of the network; None takes the number of labels of the training set."""
    width: float = 1.0
    """Factor on every channel count (1.0 is the paper's network)."""
    dropout: float = 0.0
    """Dropout rate before the classifier (paper, section 4.3: 0.5 for ImageNet)."""
    fc: tuple[int, ...] = ()
    """Units of fully connected layers before the classifier (paper, table 2: 4096 4096); vgg16 has
    its own two of 4096 instead.
    """
    middle_modules: int = 8
    """xception: modules of the middle flow (paper, figure 5: 8)."""
    residual: bool = True
    """xception: residual connections around the modules (paper, section 4.6)."""
    mid_activation: Literal["none", "relu", "elu"] = "none"
    """xception: activation between depthwise and pointwise convolution (paper, figure 10: none)."""
    segments: int | None = None
    """xception: channel groups of the spatial convolutions (paper, section 1.2); None is one a
    channel: depthwise. A layer has no more of them than channels.
    """
    layout: Literal["today", "2016"] = "today"
    """inception_v3: today is Keras' and TF-slim's; 2016 is the Keras network of the paper's table
    3, 23,626,728 parameters.
    """
    small_input: bool = False
    """inception_v3: a stem whose convolutions keep the size of the map, for images of 31 pixels or
    more; the usual one takes 75 or more.
    """
    pooled_size: int = 1
    """vgg_separable: rows and columns that the last feature map is averaged to; 1 is a global
    average, 7 the flattened map of VGG at 224 pixels.
    """
    conv_bias: bool = True
    """resnet50, resnet101, resnet152: convolutions have a bias, as in Keras; torchvision's have
    none.
    """

    def __post_init__(self) -> None:
        check_types(self, "model.")
        known = "one of " + ", ".join(MODEL_NAMES)
        check(self.name in MODEL_NAMES, "model.name", self.name, known)
        check_least(self, "model.", num_classes=1, middle_modules=0, segments=1, pooled_size=1)
        check(0 < self.width <= 8, "model.width", self.width, "above 0, at most 8")
        for name, most in MOST.items():
            value = getattr(self, name)
            check(value is None or value <= most, f"model.{name}", value, f"at most {most:,}")
        are_units = len(self.fc) <= MOST_LAYERS and all(1 <= each <= MOST_UNITS for each in self.fc)
        units = f"up to {MOST_LAYERS} unit counts, each of 1 to {MOST_UNITS:,}"
        check(are_units, "model.fc", self.fc, units)
        check(0 <= self.dropout < 1, "model.dropout", self.dropout, "at least 0, below 1")
        self._check_foreign_options()

    def _check_foreign_options(self) -> None:
        """What only other networks have is at its default."""
        for option in fields(self):
            owners = [name for name, own in MODEL_OPTIONS.items() if option.name in own]
            if owners and self.name not in owners:
                value, default = getattr(self, option.name), option.default
                allowed = f"{default!r} with {self.name}; a field of {', '.join(owners)}"
                check(value == default, f"model.{option.name}", value, allowed)

    def options(self) -> dict[str, Any]:
        """What the chosen network is built with, by the names of its constructor's arguments; the
        number of classes is not among it.
        """
        names = ("width", "dropout", *MODEL_OPTIONS[self.name])
        return {name: getattr(self, name) for name in names}

    def of_network(self, name: str) -> ModelConfig:
        """The same for another network: what it does not have is at its default."""
        common = {field.name for field in fields(self)} - set().union(*MODEL_OPTIONS.values())
        kept = common.union(MODEL_OPTIONS.get(name, ()))
        values = {field: value for field, value in asdict(self).items() if field in kept}
        return ModelConfig(**{**values, "name": name})

    @property
    def least_image_size(self) -> int:
        """Pixels a side, below which nothing is left of the network's last feature map."""
        if self.name == "inception_v3" and self.small_input:
            return 31
        return LEAST_IMAGE_SIZES.get(self.name, 1)
