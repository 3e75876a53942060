"""How far our crops are from Pillow's, of the same boxes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from datapipe.config import DataConfig
from datapipe.decode import Box, active_kernel, decode_into
from datapipe.index import ShardIndex
from datapipe.reader import RawSample, SampleReader
from datapipe.transforms import augmentation_draws, evaluation_boxes, training_boxes

NUM_EPOCHS = 2


@dataclass(frozen=True)
class Difference:
    """What was compared with which kernel."""

    mean: float
    """Of absolute differences of bytes: the largest of the data sets' means."""
    kernel: str
    """Its name and detail."""


def difference_to_pillow(
    directories: Sequence[str], *, image_size: int, num_images: int
) -> Difference:
    """Of training crops (two epochs) and centre crops of the first images of each data set."""
    means = []
    for directory in directories:
        index = ShardIndex.open(directory)
        config = DataConfig(train=directory, image_size=image_size)
        reader = SampleReader(index, block_size=config.block_size, max_blocks=1)
        samples = reader.fetch(np.arange(num_images, dtype=np.int64))
        means.append(np.mean([_difference(sample, config) for sample in samples]))
    kernel = active_kernel()
    return Difference(round(float(max(means)), 4), f"{kernel.name}: {kernel.detail}")


def _difference(sample: RawSample, config: DataConfig) -> float:
    assert sample.payload is not None
    side = config.image_size
    ours = np.empty((side, side, 3), np.uint8)
    differences = []
    for box, flip in _crops(sample, config):
        decode_into(sample.payload, box, flip, ours)
        theirs = _pillow(bytes(sample.payload), box, flip, side)
        differences.append(np.abs(ours.astype(np.int16) - theirs).mean())
    return float(np.mean(differences))


def _crops(sample: RawSample, config: DataConfig) -> list[tuple[Box, bool]]:
    epochs = np.arange(NUM_EPOCHS, dtype=np.int64)
    widths, heights = np.full(NUM_EPOCHS, sample.width), np.full(NUM_EPOCHS, sample.height)
    draws = augmentation_draws(0, epochs, np.full(NUM_EPOCHS, sample.sample_id))
    boxes, flips = training_boxes(widths, heights, draws, config)
    centre = evaluation_boxes(widths[:1], heights[:1], config)
    return [
        (tuple(box), flip)
        for box, flip in zip(
            [*boxes.tolist(), *centre.tolist()], [*flips.tolist(), False], strict=True
        )
    ]


def _pillow(payload: bytes, box: Box, flip: bool, side: int) -> NDArray[np.uint8]:
    with Image.open(BytesIO(payload)) as image:
        scaled = image.convert("RGB").resize((side, side), Image.Resampling.BILINEAR, box=box)
    pixels = np.asarray(scaled)
    return pixels[:, ::-1] if flip else pixels
