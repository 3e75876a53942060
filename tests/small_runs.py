"""Small training runs: their data and configuration, what they leave, faults planned by step."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import Tensor

from datapipe.batch import Batch
from datapipe.batch_stream import BatchStream
from datapipe.config import DataConfig
from datapipe.index import ShardIndex
from datapipe.labels import Label
from datapipe.order import SampleOrder
from datapipe.plan import BatchPlan
from datapipe.writer import RawImage, write_shards
from tests.datapipe.small_sets import encode, labels_of, picture
from tests.strategies import ActsBefore
from xdist import checkpoint, training
from xdist.checkpoint import Checkpoint
from xdist.config import CheckpointConfig, OptimizerConfig, TrainConfig
from xdist.model_config import ModelConfig
from xdist.run_directory import RunDirectory
from xdist.summary import Summary

NUM_TRAIN, NUM_EVALUATION = 90, 30
NUM_LABELS = 10


def write_run_data(directory: Path, *, single_label: bool) -> DataConfig:
    """A training and an evaluation set of drawn images, and the configuration that reads them."""
    for split, first, count in (("train", 0, NUM_TRAIN), ("evaluation", NUM_TRAIN, NUM_EVALUATION)):
        images = [
            RawImage(encode(picture(number)), "jpg", labels_of(number)[: 1 if single_label else 2])
            for number in range(first, first + count)
        ]
        write_shards(
            images,
            directory=str(directory / split),
            labels=[Label(i, f"label {i}", 0.1 + i / 100) for i in range(NUM_LABELS)],
            prefix=split,
            samples_per_shard=40,
            shard_bytes=None,
        )
    return DataConfig(
        train=str(directory / "train"),
        evaluation=str(directory / "evaluation"),
        image_size=16,
        block_size=4,
        blocks_per_pool=3,
        decode_threads=1,
    )


def small_config(
    directory: Path, *, strategy: str, is_scored: bool = False, **changes: Any
) -> TrainConfig:
    """A run of a few seconds on drawn images, written to `directory`; two epochs of 23 steps."""
    is_sync = strategy == "all_reduce"
    data = write_run_data(directory, single_label=is_sync)
    config = TrainConfig(
        data=data if is_scored else replace(data, evaluation=None),
        strategy="all_reduce" if is_sync else "push_pull",
        loss="softmax" if is_sync else "sigmoid",
        model=ModelConfig(num_classes=NUM_LABELS, width=0.0625, middle_modules=0),
        optimizer=OptimizerConfig(
            name="sgd" if is_sync else "rmsprop",
            learning_rate=0.01,
            decay_every=60,
            average_half_life_samples=50,
        ),
        checkpoint=CheckpointConfig(every_samples=40, keep=100, evaluate_every=0),
        batch_size=4,
        num_epochs=2,
        num_workers=2,
        num_servers="auto" if is_sync else 2,
        report_every_steps=3,
    )
    return replace(config, **changes)


def run(config: TrainConfig, run_dir: Path | str, **arguments: Any) -> Summary:
    """Drive a run to its end from this process. run_dir: or a URL."""
    console = Console(stderr=True, force_terminal=False)
    with RunDirectory(str(run_dir), config) as directory:
        return training.train(config, directory, console=console, **arguments)


def batches_of(config: TrainConfig, plans: Iterable[BatchPlan]) -> list[Batch]:
    """Batches of the training set, as the workers of a run get them."""
    index = ShardIndex.open(config.data.train)
    data = config.data
    order = SampleOrder(index.num_samples, data.block_size, data.blocks_per_pool, config.seed)
    with BatchStream.of_plans(
        index, data, plans, order=order, training=True, num_classes=NUM_LABELS
    ) as stream:
        return list(stream)


def saved_step(run_dir: Path | str) -> int:
    """That of the last checkpoint."""
    found = checkpoint.latest(str(run_dir))
    assert found is not None
    return found.manifest.cut.step


def final(run_dir: Path | str) -> Checkpoint:
    """The last checkpoint of a run that has ended."""
    found = checkpoint.latest(str(run_dir))
    assert found is not None
    assert found.manifest.cut.is_final
    return found


def weights_of(saved: Checkpoint, name: str = "weights") -> Tensor:
    return saved.read_range(0, saved.manifest.layout.num_weights)[name]


def records(run_dir: Path, kind: str) -> list[dict[str, Any]]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


def spoil(shard: Path, *, num_samples: int) -> None:
    """Overwrite the first images of a shard, the first of its directory, with zeros."""
    table = ShardIndex.open(str(shard.parent)).table(0)
    payload = bytearray(shard.read_bytes())
    for start, size in zip(table.offsets[:num_samples], table.sizes[:num_samples], strict=True):
        payload[int(start) : int(start + size)] = bytes(int(size))
    shard.write_bytes(payload)


def causes(run_dir: Path) -> list[str]:
    """Who was lost, in order."""
    return [record["cause"] for record in records(run_dir, "recovery")]


@dataclass(frozen=True)
class Fault:
    """What happens to the process of a worker, once in a run, before it applies its n-th update."""

    worker: int
    own_step: int
    marker: str
    """A file that tells that it has happened."""
    signal_number: int = signal.SIGKILL

    def strike(self) -> None:
        os.kill(os.getpid(), self.signal_number)


def faulty(make_strategy: Any, fault: Fault) -> Any:
    """The same factory of strategies, with a fault in it."""

    def make(*arguments: Any, **named: Any) -> Any:
        strategy = make_strategy(*arguments, **named)
        if named["number"] != fault.worker:
            return strategy
        return ActsBefore(strategy, fault.own_step, Path(fault.marker), fault.strike)

    return make
