"""Steps of one worker on a GPU, without Ray: for its tests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from datapipe.batch import Batch
from datapipe.config import DataConfig
from xdist.computation import BatchSums
from xdist.compute_config import ComputeConfig
from xdist.config import OptimizerConfig, TrainConfig
from xdist.flat import FlatModel
from xdist.model_config import ModelConfig
from xdist.state import STATISTICS, WEIGHTS, RangeState, StatisticsState
from xdist.step_phases import StepObserver
from xdist.strategies import Progress, Share
from xdist.strategies.group import Group, Rendezvous, open_store
from xdist.strategies.reduction import GradientReduction
from xdist.strategies.summed import StopVotes, apply_summed
from xdist.update import Step
from xdist.worker import Worker

NUM_CLASSES = 10
SIDE = 32
BATCH_SIZE = 8
CONFIG = TrainConfig(
    data=DataConfig(train="nowhere", image_size=SIDE),
    strategy="all_reduce",
    loss="softmax",
    model=ModelConfig(num_classes=NUM_CLASSES, width=0.25, middle_modules=1, dropout=0.5),
    optimizer=OptimizerConfig(learning_rate=0.01, average_decay=0.9, clip_norm=100.0),
    batch_size=BATCH_SIZE,
    num_epochs=1,
).resolved(100)


@dataclass
class NotedState(RangeState):
    """Keeps the gradients of its updates."""

    gradients: list[Tensor] = field(default_factory=list)

    def apply(self, *steps: Step, **how: Any) -> None:
        for step in steps:
            assert isinstance(step.gradients, Tensor)
            self.gradients.append(step.gradients.clone())
        super().apply(*steps, **how)


class Alone:
    """The synchronous strategy in a group of one, without checkpoints."""

    dropout_keys = (0,)
    wants_stop = False
    lacks_samples = False
    is_sending = False
    is_dropped = False
    peer_wait_s = 0.0
    state_step = 0
    num_shared = 0

    def __init__(self, config: TrainConfig, flat: FlatModel) -> None:
        self.flat = flat
        self.config = config
        self.progress = Progress(0, 0, 0, 0.0)
        self.sums: list[Tensor] = []
        optimizer = config.optimizer
        self.state = NotedState.from_tensors(
            {WEIGHTS: flat.weights},
            config=optimizer,
            start=0,
            stop=len(flat.weights),
            l2_mask=flat.layout.l2_mask(optimizer.l2_on).to(flat.weights),
            is_fused=config.compute.fused_optimizer,
        )
        self.statistics = StatisticsState.from_tensors(
            {STATISTICS: flat.statistics.clone()},
            config=optimizer,
            momentum=flat.layout.statistics_momentum,
        )
        is_bfloat16 = config.compress_gradients == "bfloat16"
        self.reduction = GradientReduction(flat, compress=is_bfloat16)
        self.votes = StopVotes()

    @property
    def seed_step(self) -> int:
        return self.progress.step

    @property
    def gradients(self) -> list[Tensor]:
        return self.state.gradients

    def join(self, _membership: Any) -> None:
        self.store = open_store("127.0.0.1")
        rendezvous = Rendezvous("127.0.0.1", self.store.port, generation=1)
        self.group = Group(
            self.store,
            rendezvous,
            rank=0,
            world_size=1,
            own_address="127.0.0.1",
            device=self.flat.weights.device,
            timeout_s=60.0,
        )

    def finish(self) -> None:
        """Nothing is on its way."""

    def take_staleness(self) -> dict[int, int]:
        return {}

    def abort(self) -> None:
        """There are no others."""

    def observe(self, observer: StepObserver) -> None:
        self.observer = observer

    def loss_divisor(self, _batch: Batch) -> float:
        return BATCH_SIZE

    def begin(self, _batch: Batch, sums: BatchSums) -> None:
        self.reduction.begin(self.group)
        sums.stop_votes.fill_(0.0)
        self.sums_work = self.group.all_reduce(sums.vector)

    def gradient_ready(self, parameter: int) -> None:
        self.reduction.ready(parameter)

    def update(self, batch: Batch, sums: BatchSums) -> None:
        self.observer.enter("all_reduce")
        self.group.wait_for_own()
        self.reduction.finish()
        self.group.wait(self.sums_work)
        self.observer.enter("optimizer")
        self.wants_stop = self.votes.read(sums.stop_votes)
        self.sums.append(sums.vector.clone())
        rate = self.config.optimizer.learning_rate
        apply_summed(
            self.flat,
            sums,
            self.state,
            self.statistics,
            divisor=self.loss_divisor(batch),
            clip_norm=self.config.optimizer.clip_norm,
            learning_rate=rate,
            average_decay=0.9,
        )
        step = self.progress.step + 1
        self.progress = Progress(step, step, step * BATCH_SIZE, rate)

    def request_stop(self) -> None:
        pass

    def wait_at_most(self, _timeout_s: float) -> None:
        pass

    def save(self, _share: Share) -> None:
        pass

    def written(self, _step: int) -> Any:
        pass

    def leave(self) -> None:
        pass


class Listed:
    """Batches of a list. From number `strict_from` on, until the list ends, a step must not wait
    for the GPU.
    """

    def __init__(self, batches: Sequence[Batch], *, strict_from: int | None = None) -> None:
        self.left = list(batches)
        self.num_strict = None if strict_from is None else len(self.left) - strict_from

    def join(self, _membership: Any, _strategy: Any) -> None:
        pass

    def take(self) -> Batch | None:
        if self.num_strict is not None:
            is_strict = 0 < len(self.left) <= self.num_strict
            torch.cuda.set_sync_debug_mode("error" if is_strict else "default")
        return self.left[0] if self.left else None

    def applied(self) -> None:
        del self.left[0]


def make_batch(number: int, *, size: int = BATCH_SIZE, labels: int = 1) -> Batch:
    """labels: of every image."""
    generator = torch.Generator().manual_seed(number)
    shape = (size, SIDE, SIDE, 3)
    images = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    ids = [torch.randperm(NUM_CLASSES, generator=generator)[:labels] for _ in range(size)]
    return Batch(
        images=images.pin_memory(),
        label_ids=torch.cat(ids),
        label_offsets=torch.arange(size + 1) * labels,
        sample_weights=torch.ones(size),
        sample_ids=torch.arange(size),
        spans=(),
        segment_sizes=(size // 2, size - size // 2),
        num_samples=size,
        corrupt=(),
    )


def trained(
    config: TrainConfig,
    batches: Sequence[Batch],
    *,
    strict_from: int | None = None,
    kind: Callable[[TrainConfig, FlatModel], Alone] | None = None,
) -> tuple[Alone, Any]:
    """The strategy, and the worker's report, after all batches."""
    strategies: list[Alone] = []

    def make_strategy(flat: FlatModel) -> Alone:
        strategies.append((kind or Alone)(config, flat))
        return strategies[0]

    worker = Worker(
        config,
        number=0,
        num_classes=NUM_CLASSES,
        make_strategy=make_strategy,
        make_batches=partial(Listed, batches, strict_from=strict_from),
    )
    worker.start()
    worker.join(None)
    report = worker.train(len(batches) + 1)
    strategies[0].group.leave()
    return strategies[0], report


def with_compute(config: TrainConfig = CONFIG, **values: Any) -> TrainConfig:
    return replace(config, compute=ComputeConfig(**values))
