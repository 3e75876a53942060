"""The workload of bench-sync, the same for all: Xception at 71 px, two images a worker and step."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Self

import torch
from torch import Tensor, nn

from datapipe.batch import normalize
from tests.benchmarks.sync_log import StepLog
from xdist.model_config import ModelConfig
from xdist.models import build_model

IMAGE_SIZE = 71
NUM_CLASSES = 1000
NUM_IMAGES = 512
NUM_WORKERS = 2
BATCH_PER_WORKER = 2
LEARNING_RATE = 0.01
MOMENTUM = 0.9
WEIGHT_DECAY = 1e-5


@dataclass(frozen=True)
class Request:
    """One run of one system, which gets this as JSON, as its only argument."""

    log: str
    """File of the `StepLog`."""
    directory: str
    """Empty directory for checkpoints."""
    data: str
    """Directory of the shards, for who reads some."""
    num_steps: int
    save_every_steps: int
    kill_rank: int
    kill_step: int | None
    cluster: dict[str, Any] = field(default_factory=dict)
    """Fields of `ClusterConfig` that are not at their default."""

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The request that `to_json` wrote."""
        return cls(**json.loads(text))

    def step_log(self, system: str, rank: int) -> StepLog:
        return StepLog(self.log, system, rank, self.kill_rank, self.kill_step)


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
