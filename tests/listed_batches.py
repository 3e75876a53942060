"""Batches of a list, for a worker of a small run."""

from __future__ import annotations

from typing import Any

import torch

from datapipe.batch import Batch
from datapipe.config import DataConfig
from datapipe.errors import CorruptSample
from datapipe.position import Span
from xdist.config import OptimizerConfig, TrainConfig
from xdist.model_config import ModelConfig

CONFIG = TrainConfig(
    data=DataConfig(train="nowhere", image_size=16),
    strategy="all_reduce",
    loss="softmax",
    model=ModelConfig(num_classes=3, width=0.0625, middle_modules=0),
    optimizer=OptimizerConfig(learning_rate=0.1),
    batch_size=4,
    num_epochs=1,
)


def make_batch(number: int, *, weights: tuple[float, ...] = (1, 1, 1, 1)) -> Batch:
    generator = torch.Generator().manual_seed(number)
    size = len(weights)
    return Batch(
        images=torch.randint(0, 256, (size, 16, 16, 3), generator=generator, dtype=torch.uint8),
        label_ids=torch.randint(0, 3, (size,), generator=generator),
        label_offsets=torch.arange(size + 1),
        sample_weights=torch.tensor(weights, dtype=torch.float32),
        sample_ids=torch.arange(size),
        spans=(Span(0, 4 * number, 4 * number + 4),),
        segment_sizes=(size,),
        num_samples=sum(weight > 0 for weight in weights),
        corrupt=(CorruptSample("s.tar", "k", 7, "broken"),) if 0 in weights else (),
    )


class Listed:
    """Batches of a list."""

    def __init__(self, batches: list[Batch]) -> None:
        self.left = list(batches)
        self.num_joined = 0

    def join(self, _membership: Any, _strategy: Any) -> None:
        self.num_joined += 1

    def take(self) -> Batch | None:
        return self.left[0] if self.left else None

    def applied(self) -> None:
        del self.left[0]
