"""What torchvision's transforms do to a PIL image, step by step, with torch's random numbers.

torchvision's wheels want the CUDA build of torch, so that it cannot be imported beside the CPU's.
These follow `torchvision.transforms` 0.29 (RandomResizedCrop, RandomHorizontalFlip, Resize,
CenterCrop, PILToTensor, ToTensor, Normalize): the same draws in the same order give the same
pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

AREA, ASPECT = (0.08, 1.0), (3 / 4, 4 / 3)
EVALUATION_CROP = 0.875
MEAN, DEVIATION = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]

Transform = Callable[[Image.Image], Tensor]


@dataclass(frozen=True)
class TrainingTransform:
    """RandomResizedCrop, RandomHorizontalFlip, PILToTensor: (3, S, S), uint8."""

    size: int

    def __call__(self, image: Image.Image) -> Tensor:
        return as_tensor(self.cropped(image))

    def cropped(self, image: Image.Image) -> Image.Image:
        top, left, height, width = _random_crop(image.width, image.height)
        crop = image.crop((left, top, left + width, top + height))
        crop = crop.resize((self.size, self.size), Image.Resampling.BILINEAR)
        if torch.rand(1) < 0.5:
            crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return crop


@dataclass(frozen=True)
class FloatTrainingTransform:
    """RandomResizedCrop, RandomHorizontalFlip, ToTensor, Normalize: (3, S, S), float32."""

    size: int

    def __call__(self, image: Image.Image) -> Tensor:
        tensor = as_tensor(TrainingTransform(self.size).cropped(image)).contiguous()
        return _normalized(tensor.to(torch.float32).div(255))


@dataclass(frozen=True)
class EvaluationTransform:
    """Resize of the shorter side, CenterCrop, PILToTensor: (3, S, S), uint8."""

    size: int

    def __call__(self, image: Image.Image) -> Tensor:
        shorter = round(self.size / EVALUATION_CROP)
        longer = int(shorter * max(image.size) / min(image.size))
        size = (shorter, longer) if image.width <= image.height else (longer, shorter)
        resized = image.resize(size, Image.Resampling.BILINEAR)
        top = round((resized.height - self.size) / 2)
        left = round((resized.width - self.size) / 2)
        return as_tensor(resized.crop((left, top, left + self.size, top + self.size)))


def as_tensor(image: Image.Image) -> Tensor:
    """PILToTensor: a view, channels first, of a copy of the pixels."""
    return torch.as_tensor(np.array(image, copy=True)).permute(2, 0, 1)


def _normalized(tensor: Tensor) -> Tensor:
    tensor = tensor.clone()
    mean = torch.as_tensor(MEAN, dtype=tensor.dtype).view(-1, 1, 1)
    deviation = torch.as_tensor(DEVIATION, dtype=tensor.dtype)
    if (deviation == 0).any():
        raise ValueError("a standard deviation is 0")
    return tensor.sub_(mean).div_(deviation.view(-1, 1, 1))


def _random_crop(width: int, height: int) -> tuple[int, int, int, int]:
    """RandomResizedCrop.get_params: top, left, height, width."""
    area = height * width
    low, high = torch.log(torch.tensor(ASPECT))
    for _ in range(10):
        tried_area = area * torch.empty(1).uniform_(*AREA).item()
        aspect = torch.exp(torch.empty(1).uniform_(low, high)).item()
        crop_width = round(math.sqrt(tried_area * aspect))
        crop_height = round(math.sqrt(tried_area / aspect))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            top = int(torch.randint(0, height - crop_height + 1, size=(1,)).item())
            left = int(torch.randint(0, width - crop_width + 1, size=(1,)).item())
            return top, left, crop_height, crop_width
    return _central_crop(width, height)


def _central_crop(width: int, height: int) -> tuple[int, int, int, int]:
    aspect, (low, high) = width / height, ASPECT
    crop_width, crop_height = width, height
    if aspect < low:
        crop_height = round(width / low)
    elif aspect > high:
        crop_width = round(height * high)
    return (height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width
