"""What only a GPU can show of a step. It needs torch, numpy and pytest alone; where there is no
more than that:

python -m pytest -c /dev/null --rootdir=. --noconftest tests/xdist/test_gpu.py
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
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
from xdist.strategies import Progress
from xdist.strategies.group import Group, Rendezvous, open_store
from xdist.strategies.reduction import GradientReduction
from xdist.strategies.summed import StopVotes, mean_statistics, scale
from xdist.update import Parts, Step
from xdist.worker import Worker

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
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


class Alone:
    """The synchronous strategy in a group of one, without checkpoints."""

    dropout_keys = (0,)
    wants_stop = False
    lacks_samples = False
    peer_wait_s = 0.0
    state_step = 0
    num_shared = 0

    def __init__(self, config: TrainConfig, flat: FlatModel) -> None:
        self.flat = flat
        self.config = config
        self.progress = Progress(0, 0, 0, 0.0)
        self.gradients: list[Tensor] = []
        self.sums: list[Tensor] = []
        optimizer = config.optimizer
        self.state = RangeState.from_tensors(
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

    def begin(self, sums: BatchSums) -> None:
        self.reduction.begin(self.group)
        sums.stop_votes.fill_(0.0)
        self.sums_work = self.group.all_reduce(sums.vector)

    def gradient_ready(self, parameter: int) -> None:
        self.reduction.ready(parameter)

    def update(self, batch: Batch, sums: BatchSums) -> None:
        self.observer.enter("all_reduce")
        self.reduction.finish()
        self.group.wait(self.sums_work)
        self.observer.enter("optimizer")
        self.wants_stop = self.votes.read(sums.stop_votes)
        factor = self.loss_divisor(batch) / sums.num_samples.clamp(min=1)
        scale(self.flat.gradients, factor, clip_norm=self.config.optimizer.clip_norm)
        self.gradients.append(self.flat.gradients.clone())
        self.sums.append(sums.vector.clone())
        rate = self.config.optimizer.learning_rate
        self.state.apply(Step(self.flat.gradients, rate, average_share=1 - 0.9))
        statistics = mean_statistics(sums, otherwise=self.statistics.running)
        self.statistics.apply(statistics, average_decay=0.9)
        step = self.progress.step + 1
        self.progress = Progress(step, step, step * BATCH_SIZE, rate)

    def request_stop(self) -> None:
        pass

    def wait_at_most(self, _timeout_s: float) -> None:
        pass

    def save(self) -> Any:
        return ()

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


@pytest.fixture(autouse=True)
def _plain_settings() -> Iterator[None]:
    """What a test switches on ends with it; TF32 would hide differences."""
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.cuda.set_sync_debug_mode("default")
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.deterministic = False
    torch.backends.cudnn.allow_tf32 = True


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


@pytest.mark.parametrize(
    "config",
    [
        CONFIG,
        with_compute(precision="bfloat16", channels_last=True),
        with_compute(accumulation_steps=2),
        with_compute(cuda_graphs=True),
        with_compute(fused_optimizer=True),
        with_compute(compile=True),
        replace(CONFIG, compress_gradients="bfloat16"),
        replace(CONFIG, loss="sigmoid"),
        replace(CONFIG, label_smoothing=0.1),
    ],
    ids=["plain", "bfloat16", "parts", "graphs", "fused", "compile", "sent16", "sigmoid", "smooth"],
)
def test_a_step_does_not_wait_for_the_gpu(config: TrainConfig) -> None:
    _, report = trained(config, [make_batch(number) for number in range(8)], strict_from=3)
    assert report.num_steps == 8


def test_cuda_graphs_are_not_recorded_anew_for_other_numbers_of_labels() -> None:
    """Recording waits for the GPU."""
    config = with_compute(replace(CONFIG, loss="sigmoid"), cuda_graphs=True)
    batches = [make_batch(number, labels=4 - number % 4) for number in range(8)]
    _, report = trained(config, batches, strict_from=1)
    assert report.num_steps == 8


def test_the_check_finds_a_step_that_waits() -> None:
    class Waits(Alone):
        def loss_divisor(self, _batch: Batch) -> float:
            return self.flat.weights[0].item() + BATCH_SIZE

    with pytest.raises(RuntimeError, match="synchroniz"):
        trained(CONFIG, [make_batch(0)] * 5, strict_from=3, kind=Waits)


@pytest.mark.parametrize(
    "config",
    [CONFIG, with_compute(accumulation_steps=2), replace(CONFIG, bn_group="lane")],
    ids=["whole", "parts", "lanes"],
)
def test_cuda_graphs_have_the_same_gradients_with_dropout(config: TrainConfig) -> None:
    """In two shapes, and back again."""
    sizes = (BATCH_SIZE, BATCH_SIZE, 6, BATCH_SIZE, 6)
    batches = [make_batch(number, size=size) for number, size in enumerate(sizes)]
    if config.bn_group == "lane":
        batches = batches[:2]
    plain, _ = trained(config, batches)
    compute = replace(config.compute, cuda_graphs=True)
    replayed, _ = trained(replace(config, compute=compute), batches)
    for expected, gradient in zip(plain.gradients, replayed.gradients, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-2, atol=1e-4 * expected.norm())
    for sums, expected in zip(replayed.sums, plain.sums, strict=True):
        torch.testing.assert_close(sums, expected, rtol=1e-3, atol=1e-3)


def test_cuda_graphs_take_labels_of_any_number() -> None:
    config = replace(CONFIG, loss="sigmoid", model=replace(CONFIG.model, dropout=0.0))
    batches = [make_batch(number, labels=1 + number % 4) for number in range(6)]
    plain, expected = trained(config, batches)
    replayed, report = trained(with_compute(config, cuda_graphs=True), batches)
    assert report.loss == pytest.approx(expected.loss, rel=1e-4)
    torch.testing.assert_close(replayed.gradients[0], plain.gradients[0], rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize(("dropout", "changes"), [(0.0, False), (0.5, True)])
def test_dropout_differs_from_step_to_step_under_cuda_graphs(dropout: float, changes: bool) -> None:
    still = replace(CONFIG.optimizer, learning_rate=1e-12)
    config = replace(CONFIG, optimizer=still, model=replace(CONFIG.model, dropout=dropout))
    strategy, _ = trained(with_compute(config, cuda_graphs=True), [make_batch(0)] * 2)
    first, second = strategy.gradients
    assert ((second - first).norm() > 0.1 * first.norm()) == changes


@pytest.mark.parametrize(
    "values", [{"compile": True}, {"channels_last": True}, {"fused_optimizer": True}]
)
def test_other_ways_have_the_same_numbers_within_rounding(values: dict[str, Any]) -> None:
    config = replace(CONFIG, model=replace(CONFIG.model, dropout=0.0))
    batches = [make_batch(number) for number in range(3)]
    plain, expected = trained(config, batches)
    other, report = trained(with_compute(config, **values), batches)
    torch.testing.assert_close(other.gradients[0], plain.gradients[0], rtol=1e-2, atol=1e-4)
    torch.testing.assert_close(other.flat.weights, plain.flat.weights, rtol=1e-2, atol=1e-3)
    assert report.loss == pytest.approx(expected.loss, rel=1e-3)


def test_bfloat16_is_for_forward_and_backward_alone() -> None:
    config = replace(CONFIG, model=replace(CONFIG.model, dropout=0.0))
    plain, expected = trained(config, [make_batch(0)])
    rounded, report = trained(with_compute(config, precision="bfloat16"), [make_batch(0)])
    assert rounded.flat.weights.dtype == rounded.flat.gradients.dtype == torch.float32
    assert report.loss == pytest.approx(expected.loss, rel=0.05)
    assert report.loss != expected.loss
    difference = (rounded.gradients[0] - plain.gradients[0]).norm()
    # Batch norm over eight images of one pixel, in the last layers, makes much of rounding.
    assert difference < 0.7 * plain.gradients[0].norm()


@pytest.mark.parametrize("is_channels_last", [False, True])
def test_the_memory_format_is_that_of_the_pixels(is_channels_last: bool) -> None:
    seen = []
    config = with_compute(channels_last=is_channels_last)

    def watched(flat: FlatModel) -> Alone:
        stem: Any = flat.model.get_submodule("stem.0")
        stem.register_forward_hook(
            lambda _module, _inputs, output: seen.append(
                output.is_contiguous(memory_format=torch.channels_last)
            )
        )
        return Alone(config, flat)

    batches = partial(Listed, [make_batch(0)])
    worker = Worker(
        config, number=0, num_classes=NUM_CLASSES, make_strategy=watched, make_batches=batches
    )
    worker.start()
    worker.join(None)
    worker.train(1)
    assert seen == [is_channels_last]


@pytest.mark.parametrize(
    "values",
    [{}, {"channels_last": True}, {"precision": "bfloat16", "channels_last": True}],
    ids=["plain", "channels_last", "bfloat16_last"],
)
def test_two_deterministic_runs_are_equal_to_the_bit(values: dict[str, Any]) -> None:
    config = with_compute(replace(CONFIG, deterministic=True), **values)
    batches = [make_batch(number, labels=3) for number in range(5)]
    first, _ = trained(config, batches)
    second, _ = trained(config, batches)
    assert torch.equal(first.flat.weights, second.flat.weights)
    assert torch.equal(first.statistics.running, second.statistics.running)


@pytest.mark.parametrize("is_replayed", [False, True])
def test_a_profile_has_the_phases_and_the_kernels(is_replayed: bool) -> None:
    config = with_compute(replace(CONFIG, profile=True), cuda_graphs=is_replayed)
    _, report = trained(config, [make_batch(number) for number in range(9)])
    parts = ["replay"] if is_replayed else ["forward", "backward"]
    assert list(report.profile.times.milliseconds()) == [
        "data", *parts, "all_reduce", "optimizer", "other",
    ]  # fmt: skip
    assert report.profile.trace[:2] == b"\x1f\x8b"


def test_a_server_with_a_gpu_updates_its_range_there() -> None:
    """Gradients come in parts and on the host, and so do the weights that it sends."""
    size = 100_003
    generator = torch.Generator().manual_seed(0)
    weights, *gradients = (torch.randn(size, generator=generator) for _ in range(4))
    on_gpu, on_cpu = (
        RangeState.from_tensors(
            {WEIGHTS: weights.to(device, copy=True)},
            config=OptimizerConfig(name="rmsprop", l2=1e-4, average_decay=0.9),
            start=0,
            stop=size,
            l2_mask=torch.ones(size, device=device),
            is_fused=device == "cuda",
        )
        for device in ("cuda", "cpu")
    )
    sent, rounded = torch.empty(size), torch.empty(size, dtype=torch.bfloat16)
    for gradient in gradients:
        halves = gradient.to(torch.bfloat16)
        parts = Parts({0: halves[:777].clone(), 777: halves[777:].clone()})
        step = Step(parts, 0.1, scale=0.5, average_share=0.1)
        on_gpu.apply(step, weights_out=sent, bfloat16_out=rounded)
        on_cpu.apply(step)
    assert on_gpu.weights.device.type == "cuda"
    for name, tensor in on_cpu.tensors().items():
        torch.testing.assert_close(on_gpu.tensors()[name].cpu(), tensor, rtol=1e-5, atol=1e-6)
    assert torch.equal(sent, on_gpu.weights.cpu())
    assert torch.equal(rounded, sent.to(torch.bfloat16))
