"""This project's synchronous training, from real shards, on the cluster of RAY_ADDRESS."""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import partial

from rich.console import Console

from datapipe.config import DataConfig
from tests.benchmarks.sync_request import (
    BATCH_PER_WORKER,
    IMAGE_SIZE,
    LEARNING_RATE,
    MOMENTUM,
    NUM_CLASSES,
    NUM_IMAGES,
    NUM_WORKERS,
    WEIGHT_DECAY,
    Request,
)
from xdist.config import CheckpointConfig, ClusterConfig, OptimizerConfig, TrainConfig
from xdist.connection import connect
from xdist.model_config import ModelConfig
from xdist.run_directory import RunDirectory

BATCH_SIZE = NUM_WORKERS * BATCH_PER_WORKER


def config_of(request: Request) -> TrainConfig:
    return TrainConfig(
        data=DataConfig(train=request.data, image_size=IMAGE_SIZE, decode_threads=1),
        strategy="all_reduce",
        loss="softmax",
        model=ModelConfig(num_classes=NUM_CLASSES),
        optimizer=OptimizerConfig(
            learning_rate=LEARNING_RATE, momentum=MOMENTUM, l2=WEIGHT_DECAY, l2_on="all"
        ),
        checkpoint=CheckpointConfig(every_samples=request.save_every_steps * BATCH_SIZE),
        cluster=replace(ClusterConfig(), **request.cluster),
        batch_size=BATCH_SIZE,
        num_epochs=request.num_steps * BATCH_SIZE // NUM_IMAGES + 1,
        max_steps=request.num_steps,
        num_workers=NUM_WORKERS,
        run_dir=request.directory,
    )


def main(request: Request) -> None:
    """Run to the end."""
    config = config_of(request)
    connect(config.cluster)
    # As in a job, what needs torch comes after.
    from tests.benchmarks.sync_ours_strategy import logged_strategy
    from xdist import training
    from xdist.topologies.all_reduce import AllReduceTopology

    topology = partial(AllReduceTopology, make_strategy=partial(logged_strategy, request))
    with RunDirectory(request.directory, config) as run:
        training.train(
            config,
            run,
            console=Console(stderr=True, force_terminal=False),
            topologies={"all_reduce": topology},
        )


if __name__ == "__main__":
    main(Request.from_json(sys.argv[1]))
