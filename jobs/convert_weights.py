"""Convert weights between this project, Keras Applications, timm, safetensors and ONNX.

python jobs/convert_weights.py xception_weights_tf_dim_ordering_tf_kernels.h5 xception.safetensors
python jobs/convert_weights.py ~/xdist-runs/imagenet_sync-12345678 xception.onnx
"""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass

import tyro

from datapipe.errors import DataError
from datapipe.storage import absolute
from xdist.errors import XdistError
from xdist.naming import TIMM
from xdist.state import WeightsName
from xdist.weight_files import (
    FILE_SUFFIXES,
    TARGET_SUFFIXES,
    read_checkpoint,
    read_file,
    write,
)
from xdist.weights import Fitted

IMAGE_SIZE = 299  # The paper's
TIMM_DIFFERS = (
    "note: timm's legacy_xception has batch-norm epsilon 1e-5 and pads both sides before every max "
    "pool; here it is 1e-3, and an even side is padded at its end, as in Keras. So the logits of "
    "the same weights differ a little"
)


@dataclass(frozen=True)
class ConvertConfig:
    """What is converted, and into what."""

    source: tyro.conf.Positional[str]
    """Path or URL of .h5 or .keras (Keras Applications: Xception, Inception V3), of .pt, .pth or
    .safetensors (a state_dict: ours, or Xception of timm or pretrainedmodels), of one of our
    checkpoints, or of a run, whose newest checkpoint is taken.
    """
    target: tyro.conf.Positional[str]
    """Path or URL of .safetensors, .pt, .onnx or .weights.h5 (Keras 3); replaced if it exists."""
    model: str | None = None
    """The network in a source file, if it is not recognised: a name, or the config.json of a run
    where the network's options are not the paper's.
    """
    weights: WeightsName | None = None
    """Which weights of a checkpoint: average or raw; None takes averaged ones if it has them."""
    image_size: int | None = None
    """Pixels of a side of the images that a .onnx takes; None is 299."""

    def __post_init__(self) -> None:
        endings = ", ".join(TARGET_SUFFIXES)
        if not self.target.endswith(TARGET_SUFFIXES):
            raise ValueError(f"the target is {self.target}; allowed endings: {endings}")
        if self.is_file and self.weights is not None:
            raise ValueError(f"--weights is {self.weights}; allowed: only with a checkpoint")
        if not self.is_file and self.model is not None:
            raise ValueError(
                f"--model is {self.model}; allowed: only with a file, as a checkpoint "
                "says what its network is"
            )
        if self.image_size is not None and not self.target.endswith(".onnx"):
            raise ValueError(f"--image-size is {self.image_size}; allowed: only with .onnx")
        if self.image_size is not None and self.image_size < 1:
            raise ValueError(f"--image-size is {self.image_size}; allowed: at least 1")

    @property
    def is_file(self) -> bool:
        return self.source.endswith(FILE_SUFFIXES)


def convert(config: ConvertConfig) -> Fitted:
    """Read, fit and write. Raises `UserError`, and nothing is written."""
    source, target = absolute(config.source), absolute(config.target)
    if config.is_file:
        fitted = read_file(source, model=config.model)
    else:
        fitted = read_checkpoint(source, weights=config.weights)
    write(target, fitted, image_size=config.image_size or IMAGE_SIZE)
    return fitted


def main(arguments: list[str] | None = None) -> int:
    """0, or 2 with one line on stderr for what the user can mend."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    # It names operators of torchvision, which no network here has.
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    try:
        config = tyro.cli(ConvertConfig, args=arguments, description=__doc__)
        fitted = convert(config)
    except (DataError, XdistError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command starts over", file=sys.stderr)
        return 130
    if fitted.style == TIMM:
        print(TIMM_DIFFERS, file=sys.stderr)
    num_weights = sum(parameter.numel() for parameter in fitted.network.parameters())
    print(
        f"converted {fitted.model.name} ({num_weights:,} parameters, {fitted.model.num_classes} "
        f"classes, named as in {fitted.style}) to {config.target}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
