"""The shards that bench-sync trains from: JPEGs a little larger than the network's input."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from datapipe.writer import RawImage, write_shards
from tests.benchmarks.sync_request import IMAGE_SIZE, NUM_CLASSES, NUM_IMAGES

LARGEST_SIDE = 96


def write_data(directory: Path) -> None:
    """Shards of JPEGs of noise, each side of 71 to 96 pixels."""
    write_shards(
        _images(),
        directory=str(directory),
        labels=None,
        prefix="train",
        samples_per_shard=128,
        shard_bytes=None,
    )


def _images() -> Iterator[RawImage]:
    generator = np.random.default_rng(0)
    for number in range(NUM_IMAGES):
        height, width = generator.integers(IMAGE_SIZE, LARGEST_SIDE + 1, 2)
        pixels = generator.integers(0, 256, (height, width, 3)).astype(np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "JPEG")
        yield RawImage(buffer.getvalue(), "jpg", (number % NUM_CLASSES,))
