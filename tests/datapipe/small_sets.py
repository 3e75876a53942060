"""Small data sets of drawn images for tests."""

from __future__ import annotations

import tarfile
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from datapipe.config import DataConfig
from datapipe.index import ShardIndex
from datapipe.order import SampleOrder
from datapipe.reader import RawSample, SampleReader
from datapipe.writer import RawImage, write_shards

NUM_CLASSES = 10


def picture(number: int, *, width: int = 24, height: int = 20) -> Image.Image:
    """A smooth picture that is different for every number."""
    ramp = np.add.outer(np.arange(height) * 5, np.arange(width) * 3)
    channels = [(ramp + number * step) % 256 for step in (7, 29, 53)]
    return Image.fromarray(np.stack(channels, axis=2).astype(np.uint8))


def encode(
    image: Image.Image, image_format: str = "JPEG", *, transparency: int | bytes | None = None
) -> bytes:
    buffer = BytesIO()
    image.save(buffer, image_format, transparency=transparency)
    return buffer.getvalue()


def labels_of(number: int) -> tuple[int, ...]:
    return (number % 7, 7 + number % 3)


def raw_images(num_samples: int) -> list[RawImage]:
    return [
        RawImage(encode(picture(number)), "jpg", labels_of(number)) for number in range(num_samples)
    ]


def write_set(directory: Path, *, num_samples: int, samples_per_shard: int | None) -> ShardIndex:
    return write_shards(
        raw_images(num_samples),
        directory=str(directory),
        labels=None,
        prefix="train",
        samples_per_shard=samples_per_shard,
        shard_bytes=None,
    )


def small_config(index: ShardIndex, *, max_bad_samples: int = 100) -> DataConfig:
    return DataConfig(
        train=index.directory,
        image_size=16,
        block_size=4,
        blocks_per_pool=3,
        max_bad_samples=max_bad_samples,
    )


def small_order(index: ShardIndex, *, shuffle: bool = True) -> SampleOrder:
    return SampleOrder(index.num_samples, block_size=4, blocks_per_pool=3, seed=5, shuffle=shuffle)


def read_all(index: ShardIndex) -> list[RawSample]:
    reader = SampleReader(index, block_size=8, max_blocks=2)
    return reader.fetch(np.arange(index.num_samples, dtype=np.int64))


def labels_in(index: ShardIndex) -> list[list[int] | None]:
    return [None if sample.labels is None else sample.labels.tolist() for sample in read_all(index)]


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, payload in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(payload)
            tar.addfile(info, BytesIO(payload))
