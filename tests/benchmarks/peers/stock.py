"""WebDataset as its documentation has it: PIL decodes, torchvision's transforms crop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import webdataset
from torch.utils.data import DataLoader

from tests.benchmarks.peers.stock_transforms import (
    EvaluationTransform,
    FloatTrainingTransform,
    TrainingTransform,
    Transform,
)
from tests.benchmarks.peers.timing import Request, Sizes, run_requested

SHUFFLED_SAMPLES = 256


def label_of(description: dict[str, Any]) -> int:
    return int(description["labels"][0])


def training(request: Request) -> Sizes:
    """uint8 batches, in this process alone."""
    return _sizes(_batches(request, TrainingTransform(request.image_size), shuffle=True))


def evaluation(request: Request) -> Sizes:
    """uint8 batches of resized, centre-cropped images in order, in this process alone."""
    return _sizes(_batches(request, EvaluationTransform(request.image_size), shuffle=False))


def float32(request: Request) -> Sizes:
    """Normalised float32 batches from a DataLoader with as many workers as cores."""
    batches = _batches(request, FloatTrainingTransform(request.image_size), shuffle=True)
    return _sizes(DataLoader(batches, batch_size=None, num_workers=request.num_cores))


def _batches(request: Request, transform: Transform, *, shuffle: bool) -> Any:
    shards = sorted(str(path) for path in Path(request.data).glob("*.tar"))
    samples = webdataset.WebDataset(shards, shardshuffle=len(shards) if shuffle else False)
    if shuffle:
        samples = samples.shuffle(SHUFFLED_SAMPLES)
    return (
        samples.repeat()
        .decode("pil")
        .to_tuple("jpg;jpeg;png;webp", "json")
        .map_tuple(transform, label_of)
        .batched(request.batch_size)
    )


def _sizes(batches: Any) -> Sizes:
    for images, _ in batches:
        yield len(images)


if __name__ == "__main__":
    run_requested({"training": training, "evaluation": evaluation, "float32": float32})
