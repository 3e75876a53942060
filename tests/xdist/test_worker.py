"""The training loop itself: what it hands to its strategy, counts and reports."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from datapipe.batch import Batch, normalize
from datapipe.config import DataConfig
from datapipe.errors import CorruptSample
from datapipe.position import Span
from xdist import losses
from xdist.config import ModelConfig, OptimizerConfig, TrainConfig
from xdist.flat import FlatModel
from xdist.strategies import Progress
from xdist.worker import Worker, initial_model

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


class Descent:
    """A strategy on one's own: plain gradient descent; it keeps the gradients that it saw."""

    def __init__(self, flat: FlatModel) -> None:
        self.flat = flat
        self.progress = Progress(0, 0, 0, 0.1)
        self.gradients: list[Tensor] = []

    def update(self, batch: Batch) -> int:
        self.gradients.append(self.flat.gradients.clone())
        self.flat.weights.sub_(self.flat.gradients, alpha=0.1)
        step = self.progress.step + 1
        self.progress = Progress(step, step, self.progress.num_samples + batch.num_samples, 0.1)
        return step % 2

    def save(self) -> Any:
        return (f"parts after {self.progress.step}",)


def make_worker(batches: list[Batch], config: TrainConfig = CONFIG) -> tuple[Worker, list[Descent]]:
    strategies: list[Descent] = []

    def make_strategy(flat: FlatModel) -> Descent:
        strategies.append(Descent(flat))
        return strategies[-1]

    def make_batches(_strategy: Descent) -> Iterator[Batch]:
        return iter(batches)

    worker = Worker(
        config, rank=0, num_classes=3, make_strategy=make_strategy, make_batches=make_batches
    )
    worker.start()
    return worker, strategies


def test_it_equals_a_plain_loop_to_the_bit() -> None:
    batches = [make_batch(number) for number in range(5)]
    worker, [strategy] = make_worker(batches)
    worker.train(5)
    flat = FlatModel(initial_model(CONFIG, num_classes=3).train())
    for batch in batches:
        flat.gradients.zero_()
        logits = flat.model(normalize(batch.images))
        loss = losses.softmax_cross_entropy(logits, batch.label_ids, batch.label_offsets)
        torch.autograd.backward(loss.mean())
        flat.weights.sub_(flat.gradients, alpha=0.1)
    assert torch.equal(strategy.flat.weights, flat.weights)


def test_it_stops_at_the_step_it_is_told_and_goes_on_from_there() -> None:
    worker, _ = make_worker([make_batch(number) for number in range(5)])
    assert worker.train(2).progress.own_step == 2
    report = worker.train(4)
    assert (report.num_steps, report.progress.own_step, report.is_final) == (2, 4, False)


def test_it_says_when_no_batch_is_left() -> None:
    worker, _ = make_worker([make_batch(0), make_batch(1)])
    report = worker.train(10)
    assert (report.num_steps, report.num_samples, report.is_final) == (2, 8, True)


def test_it_saves_after_the_step_of_the_snapshot_alone() -> None:
    worker, _ = make_worker([make_batch(number) for number in range(5)])
    report: Any = worker.train(4, 3)
    assert report.parts == ("parts after 3",)
    assert worker.train(5, None).parts == ()


def test_it_counts_staleness_and_corrupt_samples() -> None:
    worker, _ = make_worker([make_batch(0), make_batch(1, weights=(1, 0, 1, 1)), make_batch(2)])
    report = worker.train(3)
    assert report.staleness == {0: 1, 1: 2}
    assert [sample.reason for sample in report.corrupt] == ["broken"]
    assert report.num_samples == 11


def test_a_place_without_sample_is_not_in_the_loss_nor_in_its_mean() -> None:
    batch = make_batch(0, weights=(1, 1, 0, 1))
    worker, [strategy] = make_worker([batch])
    report = worker.train(1)
    flat = FlatModel(initial_model(CONFIG, num_classes=3).train())
    logits = flat.model(normalize(batch.images))
    loss = losses.softmax_cross_entropy(logits, batch.label_ids, batch.label_offsets)
    mean = loss[[0, 1, 3]].mean()
    torch.autograd.backward(mean)
    # The sum runs in another order, hence not to the bit.
    assert torch.allclose(strategy.gradients[0], flat.gradients, rtol=1e-4, atol=1e-6)
    assert report.loss == pytest.approx(mean.item(), rel=1e-6)


def test_dropout_is_a_function_of_seed_and_step() -> None:
    config = replace(CONFIG, model=replace(CONFIG.model, dropout=0.5))
    twice = [make_batch(0), make_batch(0)]
    first, [first_strategy] = make_worker(twice, config)
    second, [second_strategy] = make_worker(twice, config)
    first.train(1)
    torch.manual_seed(99)  # Whatever else draws from the global generator changes nothing.
    second.train(1)
    assert torch.equal(first_strategy.gradients[0], second_strategy.gradients[0])
    other, [other_strategy] = make_worker(twice, replace(config, seed=1))
    other.train(1)
    assert not torch.equal(first_strategy.gradients[0], other_strategy.gradients[0])


def test_the_step_needs_torch_and_numpy_alone() -> None:
    code = (
        "import sys; import xdist.worker; "
        "print({'ray', 'pyarrow', 'fsspec', 'safetensors', 'webdataset', 'tyro', 'rich'} "
        "& set(sys.modules))"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert output.stdout.decode().strip() == "set()"
