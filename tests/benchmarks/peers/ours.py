"""Our own pipeline: SampleStream for training, BatchStream for evaluation."""

from __future__ import annotations

import sys
from collections.abc import Iterator

from torch import Tensor

from datapipe.batch import normalize
from datapipe.batch_stream import BatchStream
from datapipe.config import DataConfig
from datapipe.decode import active_kernel
from datapipe.index import ShardIndex
from datapipe.kernel import LIBRARY
from datapipe.order import SampleOrder
from datapipe.plan import BatchPlan, sequential_batches
from datapipe.position import Position
from datapipe.stream import SampleStream
from tests.benchmarks.peers.timing import Request, Sizes, run_requested


def training(request: Request) -> Sizes:
    """uint8 batches."""
    with _training_stream(request) as stream:
        for batch in stream:
            yield batch.num_samples


def training_without_kernel(request: Request) -> Sizes:
    """`training`, as where no native kernel was built: the import system does not find it."""
    sys.modules[LIBRARY] = None  # type: ignore[assignment]
    assert active_kernel().name == "fallback"
    return training(request)


def float32(request: Request) -> Sizes:
    """The same, normalised to float32 by the thread that takes them, as a worker does it."""
    pixels: Tensor | None = None
    with _training_stream(request) as stream:
        for batch in stream:
            pixels = normalize(batch.images, out=pixels)
            yield batch.num_samples


def evaluation(request: Request) -> Sizes:
    """uint8 batches of the centre crops, in order."""
    index = ShardIndex.open(request.data)
    config = _config(request)
    with BatchStream.of_plans(
        index,
        config,
        _passes(index.num_samples, request.batch_size),
        order=_order(index, config, request.seed, shuffle=False),
        training=False,
        num_classes=index.num_labels,
    ) as stream:
        for batch in stream:
            yield batch.num_samples


def _passes(num_samples: int, batch_size: int) -> Iterator[BatchPlan]:
    while True:
        yield from sequential_batches(num_samples, batch_size)


def _training_stream(request: Request) -> SampleStream:
    index = ShardIndex.open(request.data)
    config = _config(request)
    return SampleStream(
        index,
        config,
        order=_order(index, config, request.seed, shuffle=True),
        position=Position(),
        batch_size=request.batch_size,
        num_lanes=1,
        rank=0,
        world_size=1,
        num_epochs=sys.maxsize,
        training=True,
        num_classes=index.num_labels,
    )


def _config(request: Request) -> DataConfig:
    return DataConfig(
        train=request.data, image_size=request.image_size, decode_threads=request.num_cores
    )


def _order(index: ShardIndex, config: DataConfig, seed: int, *, shuffle: bool) -> SampleOrder:
    return SampleOrder(
        index.num_samples,
        block_size=config.block_size,
        blocks_per_pool=config.blocks_per_pool,
        seed=seed,
        shuffle=shuffle,
    )


if __name__ == "__main__":
    run_requested(
        {
            "training": training,
            "training_without_kernel": training_without_kernel,
            "evaluation": evaluation,
            "float32": float32,
        }
    )
