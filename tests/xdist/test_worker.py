"""The training loop itself: what it hands to its strategy, counts and reports."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.spawn import spawn

from datapipe.batch import Batch, normalize
from tests.listed_batches import CONFIG, Listed, make_batch
from tests.strategies import collect_gradients
from xdist import losses
from xdist.computation import BatchSums
from xdist.compute_config import ComputeConfig
from xdist.config import TrainConfig
from xdist.determinism import CUBLAS_WORKSPACES
from xdist.errors import PeerLost
from xdist.flat import FlatModel
from xdist.step_phases import StepObserver
from xdist.strategies import Progress, Share
from xdist.worker import Worker, initial_model
from xdist.worker_messages import JoinReport, Parting


class Descent:
    """A strategy on one's own: plain gradient descent; it keeps the gradients that it saw."""

    dropout_keys = (0,)
    wants_stop = False
    lacks_samples = False
    is_sending = False
    is_dropped = False
    peer_wait_s = 0.0
    state_step = 0
    num_shared = 0

    def __init__(self, flat: FlatModel) -> None:
        self.flat = flat
        self.progress = Progress(0, 0, 0, 0.1)
        self.gradients: list[Tensor] = []
        self.has_left = self.is_finished = False
        self.staleness: Counter[int] = Counter()
        self.loses_peer_at: int | None = None
        self.stops_after: int | None = None

    @property
    def seed_step(self) -> int:
        return self.progress.step

    def join(self, _membership: Any) -> None:
        self.has_left = False

    def loss_divisor(self, batch: Batch) -> float:
        return batch.num_samples

    def begin(self, _batch: Batch, _sums: BatchSums) -> None:
        self.ready: list[int] = []

    def gradient_ready(self, parameter: int) -> None:
        self.ready.append(parameter)

    def update(self, batch: Batch, _sums: BatchSums) -> None:
        step = self.progress.step + 1
        if step == self.loses_peer_at:
            self.loses_peer_at = None
            raise PeerLost("rank 1 is gone")
        self.gradients.append(self.flat.gradients.clone())
        self.flat.weights.sub_(self.flat.gradients, alpha=0.1)
        self.progress = Progress(step, step, self.progress.num_samples + batch.num_samples, 0.1)
        self.wants_stop = step == self.stops_after
        self.staleness[step % 2] += 1

    def finish(self) -> None:
        self.is_finished = True

    def take_staleness(self) -> dict[int, int]:
        taken, self.staleness = self.staleness, Counter()
        return dict(taken)

    def request_stop(self) -> None:
        self.stops_after = self.progress.step + 1

    def abort(self) -> None:
        pass

    def wait_at_most(self, _timeout_s: float) -> None:
        pass

    def observe(self, observer: StepObserver) -> None:
        self.observer = observer

    def save(self, _share: Share) -> None:
        self.saved_step = self.progress.step

    def written(self, step: int) -> Any:
        assert step == self.saved_step
        return f"parts after {step}"

    def leave(self) -> None:
        self.has_left = True


def make_worker(batches: list[Batch], config: TrainConfig = CONFIG) -> tuple[Worker, list[Descent]]:
    strategies: list[Descent] = []

    def make_strategy(flat: FlatModel) -> Descent:
        strategies.append(Descent(flat))
        return strategies[-1]

    worker = Worker(
        config,
        number=0,
        num_classes=3,
        make_strategy=make_strategy,
        make_batches=partial(Listed, batches),
    )
    worker.start()
    assert worker.join(None) == JoinReport(0, None)
    return worker, strategies


def test_it_equals_a_plain_loop_to_the_bit() -> None:
    batches = [make_batch(number) for number in range(5)]
    worker, [strategy] = make_worker(batches)
    worker.train(5)
    flat = FlatModel(initial_model(CONFIG, num_classes=3).train())
    for batch in batches:
        logits = flat.model(normalize(batch.images))
        loss = losses.softmax_cross_entropy(logits, batch.label_ids, batch.label_offsets)
        torch.autograd.backward(loss.mean())
        collect_gradients(flat)
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


def test_samples_of_an_update_that_was_dropped_do_not_count() -> None:
    worker, [strategy] = make_worker([make_batch(0), make_batch(1)])
    strategy.is_dropped = True
    late = worker.train(1)
    assert (late.num_steps, late.num_dropped, late.num_samples, late.corrupt) == (1, 1, 0, ())
    strategy.is_dropped = False
    report = worker.train(2)
    assert (report.num_steps, report.num_dropped, report.num_samples) == (1, 0, 4)
    assert math.isfinite(report.loss)


def test_it_saves_at_the_last_step_also_when_that_was_made_before() -> None:
    worker, _ = make_worker([make_batch(number) for number in range(5)])
    report: Any = worker.train(3, share=(0, 1))
    assert report.written == "parts after 3"
    again: Any = worker.train(3, share=(0, 1))
    assert (again.num_steps, again.written) == (0, "parts after 3")
    assert worker.train(4, share=(0, 1), waits=False).written is None
    told: Any = worker.written(4)
    assert told == "parts after 4"
    assert worker.train(5).written is None


def test_a_step_that_was_interrupted_is_made_again_and_none_twice() -> None:
    batches = [make_batch(number) for number in range(4)]
    undisturbed, [reference] = make_worker(batches)
    undisturbed.train(4)
    worker, [strategy] = make_worker(batches)
    strategy.loses_peer_at = 3
    report = worker.train(4)
    assert report.interrupted == Parting("rank 1 is gone")
    assert (report.num_steps, report.progress.step, report.num_samples) == (2, 2, 8)
    assert strategy.has_left
    worker.join(None)
    rest = worker.train(4)
    assert (rest.num_steps, rest.interrupted) == (2, None)
    assert torch.equal(strategy.flat.weights, reference.flat.weights)


def test_it_stops_when_the_ranks_agreed_to() -> None:
    worker, _ = make_worker([make_batch(number) for number in range(5)])
    worker.train(1)
    worker.request_stop()
    report = worker.train(5)
    assert (report.progress.step, report.is_final, report.interrupted) == (2, False, None)


def test_its_pulse_tells_its_phase_and_its_longest_step() -> None:
    worker, _ = make_worker([make_batch(number) for number in range(3)])
    assert worker.pulse(0.0).longest_step_s == 0
    worker.train(3)
    pulse = worker.pulse(0.0, patience_s=5.0)
    assert pulse.phase == "idle"
    assert 0 < pulse.longest_step_s < 60


def test_every_gradient_is_told_once_and_the_last_layers_come_first() -> None:
    worker, [strategy] = make_worker([make_batch(0)])
    worker.train(1)
    assert sorted(strategy.ready) == list(range(len(strategy.flat.layout.parameters)))
    assert strategy.ready[0] > strategy.ready[-1]


@pytest.mark.parametrize("num_parts", [1, 2])
def test_a_batch_in_parts_has_the_gradient_of_the_parts(num_parts: int) -> None:
    compute = ComputeConfig(accumulation_steps=num_parts, precision="float64")
    worker, [strategy] = make_worker([make_batch(0)], replace(CONFIG, compute=compute))
    worker.train(1)
    flat = FlatModel(initial_model(CONFIG, num_classes=3).double().train())
    batch = make_batch(0)
    pixels = normalize(batch.images).double()
    total = torch.zeros_like(flat.gradients)
    for rows in torch.arange(4).tensor_split(num_parts):
        logits = flat.model(pixels[rows])
        offsets = torch.arange(len(rows) + 1)
        loss = losses.softmax_cross_entropy(logits, batch.label_ids[rows], offsets)
        torch.autograd.backward(loss.sum() / 4)
        collect_gradients(flat)
        total += flat.gradients
    torch.testing.assert_close(strategy.gradients[0], total, rtol=1e-9, atol=1e-12)


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
    collect_gradients(flat)
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


def test_a_run_that_is_not_profiled_reports_no_profile() -> None:
    worker, _ = make_worker([make_batch(number) for number in range(9)])
    assert worker.train(9).profile is None


def start_deterministic(_rank: int, path: str) -> None:
    worker, [strategy] = make_worker([make_batch(0)], replace(CONFIG, deterministic=True))
    worker.train(1)
    switches = (
        torch.are_deterministic_algorithms_enabled(),
        torch.backends.cudnn.deterministic,
        torch.backends.cudnn.benchmark,
        os.environ.get(CUBLAS_WORKSPACES),
    )
    torch.save((switches, strategy.gradients), path)


def test_a_deterministic_worker_is_so_in_its_own_process(tmp_path: Path) -> None:
    results = []
    for name in ("first", "second"):
        path = str(tmp_path / name)
        spawn(start_deterministic, (path,))  # type: ignore[no-untyped-call]
        results.append(torch.load(path))
    (switches, first), (_, second) = results
    assert switches == (True, True, False, ":4096:8")
    assert torch.equal(first[0], second[0])
    assert not torch.are_deterministic_algorithms_enabled()
    assert CUBLAS_WORKSPACES not in os.environ


def test_the_step_needs_torch_and_numpy_alone() -> None:
    code = (
        "import sys; import xdist.worker; "
        "print({'ray', 'pyarrow', 'fsspec', 'safetensors', 'webdataset', 'tyro', 'rich'} "
        "& set(sys.modules))"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert output.stdout.decode().strip() == "set()"
