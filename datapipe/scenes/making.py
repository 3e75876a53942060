"""The built-in synthetic data set as shards, in a directory that is complete or absent."""

from __future__ import annotations

import io
import os
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from datapipe.labels import Label
from datapipe.scenes import SPLITS, Split, label_names, scene
from datapipe.scenes.drawing import draw
from datapipe.writer import RawImage, write_shards

VERSION = 3
"""Changes with a pixel, a label or the index's form; part of the directory's name."""

SMALLEST_IMAGE_SIZE = 16
JPEG_QUALITY = 90
SAMPLES_PER_SHARD = 1000


@dataclass(frozen=True)
class ScenesConfig:
    """Which scenes are made."""

    num_train: int = 4000
    """Scenes of the training split."""
    num_evaluation: int = 1000
    """Scenes of the held-out split."""
    image_size: int = 64
    """Side of the images, in pixels."""
    seed: int = 0
    """Seed of both splits."""

    def __post_init__(self) -> None:
        for name, least in (
            ("num_train", 1),
            ("num_evaluation", 1),
            ("image_size", SMALLEST_IMAGE_SIZE),
            ("seed", 0),
        ):
            value = getattr(self, name)
            if value < least:
                option = name.replace("_", "-")
                raise ValueError(f"--{option} is {value}; allowed: at least {least}")

    def directory_name(self) -> str:
        """Differs wherever the scenes differ."""
        return (
            f"scenes-v{VERSION}-seed{self.seed}-{self.num_train}-{self.num_evaluation}"
            f"-{self.image_size}px"
        )


@dataclass(frozen=True)
class SceneDirectories:
    """The two splits, as shards with index.json and the same labels.json."""

    train: Path
    evaluation: Path


def ensure_scenes(directory: Path, config: ScenesConfig) -> SceneDirectories:
    """The scenes in their own directory below `directory`, made if absent.

    They are complete or absent: made under a temporary name and renamed, so of several makers the
    first wins and the others take its result. Errors: `OSError`.
    """
    directory = directory.expanduser().absolute()
    finished = directory / config.directory_name()
    directories = SceneDirectories(*(finished / split for split in SPLITS))
    if finished.exists():
        return directories
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{finished.name}-", dir=directory) as temporary:
        making = Path(temporary) / finished.name
        _write_scenes(making, config)
        try:
            os.rename(making, finished)
        except OSError:
            if not finished.exists():
                raise
    return directories


def _write_scenes(directory: Path, config: ScenesConfig) -> None:
    sizes = {"train": config.num_train, "evaluation": config.num_evaluation}
    counts = Counter(
        name
        for number in range(config.num_train)
        for name in scene(config.seed, "train", number).labels()
    )
    labels = [
        Label(id=number, name=name, weight=counts[name] / config.num_train)
        for number, name in enumerate(label_names())
    ]
    for split in SPLITS:
        write_shards(
            raw_images(config.seed, split, num_scenes=sizes[split], image_size=config.image_size),
            directory=str(directory / split),
            labels=labels,
            prefix=split,
            samples_per_shard=SAMPLES_PER_SHARD,
            shard_bytes=None,
        )


def raw_images(seed: int, split: Split, *, num_scenes: int, image_size: int) -> Iterator[RawImage]:
    """The scenes of a split, drawn and encoded."""
    id_of_name = {name: number for number, name in enumerate(label_names())}
    for number in range(num_scenes):
        current = scene(seed, split, number)
        buffer = io.BytesIO()
        draw(current, image_size=image_size).save(buffer, "JPEG", quality=JPEG_QUALITY)
        label_ids = tuple(sorted(id_of_name[name] for name in current.labels()))
        yield RawImage(buffer.getvalue(), "jpg", label_ids)
