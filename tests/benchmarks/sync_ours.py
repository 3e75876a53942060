"""This project's synchronous training, from real shards, on the cluster of RAY_ADDRESS."""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import partial
from typing import Any

from rich.console import Console

from datapipe.batch import Batch
from datapipe.config import DataConfig
from tests.benchmarks.sync_log import StepLog
from tests.benchmarks.sync_workload import (
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
from tests.strategies import Wrapped
from xdist import driver
from xdist.computation import BatchSums
from xdist.config import CheckpointConfig, ClusterConfig, OptimizerConfig, TrainConfig
from xdist.flat import FlatModel
from xdist.model_config import ModelConfig
from xdist.run_directory import RunDirectory
from xdist.topologies import RunPlan
from xdist.topologies.all_reduce import AllReduceTopology, all_reduce_strategy

BATCH_SIZE = NUM_WORKERS * BATCH_PER_WORKER


class Logged(Wrapped):
    """A strategy whose finished updates are logged."""

    def __init__(self, strategy: Any, log: StepLog) -> None:
        super().__init__(strategy)
        self._log = log

    def update(self, batch: Batch, sums: BatchSums) -> None:
        self.strategy.update(batch, sums)
        self._log.finished(self.strategy.progress.step)

    def kill_if_planned(self, *_of_forward: object) -> None:
        """Called after every forward, where the peers' processes are killed too: their all-reduce
        begins with backward.
        """
        self._log.kill_before(self.strategy.progress.step + 1)


def logged_strategy(request: Request, plan: RunPlan, flat: FlatModel, **named: Any) -> Any:
    """The strategy of one worker, logged, whose process may end before an update."""
    strategy = all_reduce_strategy(plan, flat, **named)
    logged = Logged(strategy, request.step_log("ours", named["number"]))
    flat.model.register_forward_hook(logged.kill_if_planned)
    return logged


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
    driver.connect()
    config = config_of(request)
    topology = partial(AllReduceTopology, make_strategy=partial(logged_strategy, request))
    with RunDirectory(request.directory, config) as run:
        driver.train(
            config,
            run,
            console=Console(stderr=True, force_terminal=False),
            topologies={"all_reduce": topology},
        )


if __name__ == "__main__":
    main(Request.from_json(sys.argv[1]))
