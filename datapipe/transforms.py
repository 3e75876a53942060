"""Which part of an image becomes the network's input. Pure.

Augmentation is a function of (seed, epoch, sample): a sample looks the same whoever decodes it, and
again after a resume.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from datapipe.config import DataConfig
from datapipe.hashing import key_of, splitmix64, uniforms

AUGMENTATION_KEY = 4
NUM_ATTEMPTS = 10
NUM_DRAWS = 2 * NUM_ATTEMPTS + 3

Floats = NDArray[np.float64]


def augmentation_draws(
    seed: int, epochs: NDArray[np.int64], sample_ids: NDArray[np.int64]
) -> Floats:
    """(N, NUM_DRAWS) numbers in [0, 1) for these samples in these epochs."""
    keys = splitmix64(epochs.astype(np.uint64) ^ key_of(seed, AUGMENTATION_KEY))
    return uniforms(splitmix64(keys ^ sample_ids.astype(np.uint64)), num_draws=NUM_DRAWS)


def training_boxes(
    widths: Floats, heights: Floats, draws: Floats, config: DataConfig
) -> tuple[Floats, NDArray[np.bool_]]:
    """Random area and aspect ratio: boxes (N, 4) as left, top, right, bottom; flips (N,).

    The crop of Szegedy et al. (arXiv 1409.4842, section 6): ten attempts, then the centre of the
    image with its aspect ratio brought into range.
    """
    areas = _between(config.crop_area, draws[:, :NUM_ATTEMPTS]) * (widths * heights)[:, None]
    low, high = np.log(config.crop_aspect)
    aspects = np.exp(_between((low, high), draws[:, NUM_ATTEMPTS : 2 * NUM_ATTEMPTS]))
    tried_widths, tried_heights = np.sqrt(areas * aspects), np.sqrt(areas / aspects)
    fits = (tried_widths <= widths[:, None]) & (tried_heights <= heights[:, None])
    rows, first = np.arange(len(widths)), fits.argmax(axis=1)
    any_fits = fits[rows, first]

    aspect = np.clip(widths / heights, *config.crop_aspect)
    centre_widths = np.minimum(widths, heights * aspect)
    crop_widths = np.where(any_fits, tried_widths[rows, first], centre_widths)
    crop_heights = np.where(any_fits, tried_heights[rows, first], centre_widths / aspect)
    shift_x = np.where(any_fits, draws[:, -3], 0.5)
    shift_y = np.where(any_fits, draws[:, -2], 0.5)
    boxes = _boxes(widths, heights, crop_widths, crop_heights, shift_x, shift_y)
    return boxes, (draws[:, -1] < 0.5) & config.flip


def evaluation_boxes(widths: Floats, heights: Floats, config: DataConfig) -> Floats:
    """The centre square, `evaluation_crop` of the shorter side: (N, 4)."""
    side = config.evaluation_crop * np.minimum(widths, heights)
    half = np.full(len(widths), 0.5)
    return _boxes(widths, heights, side, side, half, half)


def _boxes(
    widths: Floats,
    heights: Floats,
    crop_widths: Floats,
    crop_heights: Floats,
    shift_x: Floats,
    shift_y: Floats,
) -> Floats:
    left = shift_x * (widths - crop_widths)
    top = shift_y * (heights - crop_heights)
    right = np.minimum(left + crop_widths, widths)
    bottom = np.minimum(top + crop_heights, heights)
    boxes: Floats = np.maximum(np.stack([left, top, right, bottom], axis=1), 0.0)
    return boxes


def _between(limits: tuple[float, float], draws: Floats) -> Floats:
    low, high = limits
    return low + (high - low) * draws
