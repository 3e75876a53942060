"""This project's parameter servers, and workers without compute that push to them all the time.

Servers and strategies are those of a run; the workers' gradients are the same every time. Instead
of computing they may wait, which takes none of the cores from the servers.
"""

from __future__ import annotations

import json
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import ray
import torch
from ray.actor import ActorHandle

from datapipe.batch import Batch
from datapipe.config import DataConfig
from datapipe.order import SampleOrder
from datapipe.plan import leased_batches
from datapipe.position import Position, Span
from tests.benchmarks.async_workload import (
    AVERAGE_DECAY,
    DECAY,
    EPSILON,
    L2,
    LEARNING_RATE,
    MOMENTUM,
    NUM_CLASSES,
    fixed_gradient,
    make_network,
)
from xdist import checkpoint
from xdist.checkpoint import Checkpoint, Cut, Manifest
from xdist.computation import BatchSums
from xdist.config import OptimizerConfig, TrainConfig
from xdist.flat import FlatModel, even_ranges
from xdist.model_config import ModelConfig
from xdist.server_plan import ServerPlan
from xdist.servers_config import ServersConfig
from xdist.state import STATISTICS, WEIGHTS
from xdist.strategies.push_pull import Servers
from xdist.topologies import nodes
from xdist.topologies.actors import NO_RETRIES, end, server_on
from xdist.topologies.push_pull import push_pull_strategy
from xdist.topologies.remote_server import RemoteServer

BATCH_SIZE = 32
NUM_SAMPLES, NUM_PLACES = 10**6, 10**9
"""More than can be pushed."""


@dataclass(frozen=True)
class Request:
    """One measurement."""

    seconds: float
    num_servers: int
    num_workers: int = 2
    servers: Mapping[str, Any] = field(default_factory=dict)
    """Fields of `ServersConfig` that are not at their default."""
    width: float = 1.0
    """Of the Xception."""
    compute_s: float = 0.0
    """That a worker waits before each push."""
    warm_up_s: float = 6.0
    """Before the clock starts: until Ray has touched what memory it uses by turns."""


def config_of(request: Request) -> TrainConfig:
    config = TrainConfig(
        data=DataConfig(train="nowhere"),
        strategy="push_pull",
        loss="softmax",
        model=ModelConfig(num_classes=NUM_CLASSES, width=request.width),
        optimizer=OptimizerConfig(
            name="rmsprop",
            learning_rate=LEARNING_RATE,
            momentum=MOMENTUM,
            rmsprop_decay=DECAY,
            rmsprop_epsilon=EPSILON,
            l2=L2,
            average_decay=AVERAGE_DECAY,
        ),
        servers=ServersConfig(**request.servers),
        batch_size=BATCH_SIZE,
        num_epochs=1,
        num_workers=request.num_workers,
        num_servers=request.num_servers,
    )
    return config.resolved(NUM_SAMPLES)


class PushingWorker:
    """A worker of a run, without data and compute."""

    def __init__(self, config: TrainConfig, number: int, compute_s: float) -> None:
        self._flat = flat = FlatModel(make_network(config.model.width))
        gradient = fixed_gradient(flat.gradients, worker=number)
        self._gradients = [entry.view(gradient) for entry in flat.layout.parameters]
        self._strategy = push_pull_strategy(config, flat, number=number)
        self._sums = BatchSums(flat)
        self._sums.num_parts += 1
        self._compute_s = compute_s
        self._never = threading.Event()

    def join(self, servers: Servers) -> int:
        """Take part; returns the number of servers that are reached through shared memory."""
        self._strategy.join(servers)
        plans = leased_batches(self._strategy.leases(), batch_size=BATCH_SIZE)
        self._spans = (plan.spans for plan in plans)
        return self._strategy.num_shared

    def push_for(self, seconds: float) -> float:
        """Push so long; returns pushes a second."""
        started, num_pushes = time.perf_counter(), 0
        while (passed := time.perf_counter() - started) < seconds:
            self._push()
            num_pushes += 1
        return num_pushes / passed

    def finish(self) -> int:
        """See all pushes through; returns the version of the weights."""
        self._strategy.finish()
        return self._strategy.progress.step

    def _push(self) -> None:
        """What a step does after its forward: the gradients are where backward would leave them,
        and are brought into the flat vector, one by one.
        """
        batch = batch_of(next(self._spans))
        if self._compute_s:
            self._never.wait(self._compute_s)
        self._strategy.begin(batch, self._sums)
        for number in reversed(range(len(self._gradients))):
            self._flat.collect(number, self._gradients[number], adds=False)
            self._strategy.gradient_ready(number)
        self._strategy.update(batch, self._sums)


def batch_of(spans: tuple[Span, ...]) -> Batch:
    """A batch that nobody looks into."""
    nothing = torch.empty(0)
    return Batch(
        images=nothing,
        label_ids=nothing,
        label_offsets=nothing,
        sample_weights=nothing,
        sample_ids=nothing,
        spans=spans,
        segment_sizes=(BATCH_SIZE,),
        num_samples=BATCH_SIZE,
        corrupt=(),
    )


def start_checkpoint(config: TrainConfig, run_dir: str) -> Checkpoint:
    """The network's initial weights, where the servers find them."""
    flat = FlatModel(make_network(config.model.width))
    checkpoint.make_directory(run_dir)
    url = checkpoint.checkpoint_url(run_dir, 0)
    parts = (
        checkpoint.write_range(url, {WEIGHTS: flat.weights}, start=0, stop=flat.layout.num_weights),
        checkpoint.write_statistics(url, {STATISTICS: flat.statistics}),
    )
    cut = Cut(0, 0, Position(), is_final=False)
    return checkpoint.publish(
        url, Manifest(cut, flat.layout, parts, {}, config.to_json(), checkpoint.versions())
    )


@contextmanager
def pushing_workers(request: Request, start: Checkpoint) -> Iterator[list[ActorHandle[Any]]]:
    """Workers that have joined their servers; all are there within the block."""
    config = config_of(request)
    ranges = even_ranges(start.manifest.layout.num_weights, request.num_servers)
    servers = [
        server_on(
            nodes.here(),
            ServerPlan(
                config=config,
                most_workers=request.num_workers,
                checkpoint_url=start.url,
                layout=start.manifest.layout,
                start=first,
                stop=last,
                order=SampleOrder(
                    NUM_SAMPLES, config.data.block_size, config.data.blocks_per_pool, config.seed
                ),
                num_places=NUM_PLACES,
                save_every_samples=NUM_PLACES,
                is_first=number == 0,
            ),
        )
        for number, (first, last) in enumerate(ranges)
    ]
    worker_class: Any = ray.remote(PushingWorker).options(**NO_RETRIES, num_cpus=0)
    workers: list[ActorHandle[Any]] = [
        worker_class.remote(config, number, request.compute_s)
        for number in range(request.num_workers)
    ]
    try:
        begin: Any = servers[0].begin_term
        ray.get(begin.remote(1, [RemoteServer(server) for server in servers], 0))
        shared: list[int] = ray.get(
            [
                worker.join.remote(Servers(tuple(servers), ranges, worker=number))
                for number, worker in enumerate(workers)
            ]
        )
        if set(shared) != {len(servers) * config.servers.shared_memory}:
            raise RuntimeError("not all gradients go the way that is to be measured")
        yield workers
    finally:
        end([*workers, *servers])


def updates_per_second(request: Request) -> float:
    """Of all workers together, on the cluster of this process."""
    rates: list[float] = []
    with tempfile.TemporaryDirectory(prefix="bench-async-") as directory:
        start = start_checkpoint(config_of(request), directory)
        with pushing_workers(request, start) as workers:
            for seconds in (request.warm_up_s, request.seconds):
                rates = ray.get([worker.push_for.remote(seconds) for worker in workers])
            ray.get([worker.finish.remote() for worker in workers])
    return sum(rates)


def main(request: Request) -> None:
    """Measure it."""
    ray.init(log_to_driver=False)
    sys.stdout.write(json.dumps({"updates_per_s": updates_per_second(request)}) + "\n")


if __name__ == "__main__":
    main(Request(**json.loads(sys.argv[1])))
