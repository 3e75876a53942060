"""The workload of bench-sync, the same for all: Xception at 71 px, two images a worker and step."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from datapipe.batch import normalize
from tests.benchmarks.sync_request import (
    BATCH_PER_WORKER,
    IMAGE_SIZE,
    LEARNING_RATE,
    MOMENTUM,
    NUM_CLASSES,
    NUM_IMAGES,
    NUM_WORKERS,
    WEIGHT_DECAY,
)
from xdist.model_config import ModelConfig
from xdist.models import build_model


def make_network() -> nn.Module:
    """The network, in one thread; every process draws the same weights."""
    torch.set_num_threads(1)
    return build_model(ModelConfig(), num_classes=NUM_CLASSES, head_bias=0.0, seed=0)


def make_sgd(model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(
        model.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY
    )


def batches_in_memory(rank: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches without an end, of this rank's images, which lie decoded in memory.

    images: (2, 3, 71, 71), float32 in [-1, 1]; labels: (2,), int64
    """
    generator = torch.Generator().manual_seed(rank)
    size = (NUM_IMAGES // NUM_WORKERS, IMAGE_SIZE, IMAGE_SIZE, 3)
    images = torch.randint(0, 256, size, dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, NUM_CLASSES, (len(images),), generator=generator)
    while True:
        order = torch.randperm(len(images), generator=generator)
        for chosen in order.view(-1, BATCH_PER_WORKER):
            yield normalize(images[chosen]), labels[chosen]
