"""What only a GPU can show of a step. It needs torch, numpy and pytest alone; where there is no
more than that:

python -m pytest -c /dev/null --rootdir=. --noconftest tests/xdist/test_gpu.py
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

from datapipe.batch import Batch
from tests.gpu_steps import (
    BATCH_SIZE,
    CONFIG,
    NUM_CLASSES,
    Alone,
    Listed,
    make_batch,
    trained,
    with_compute,
)
from xdist.config import OptimizerConfig, TrainConfig
from xdist.flat import FlatModel
from xdist.state import WEIGHTS, RangeState
from xdist.update import Parts, Step
from xdist.worker import Worker, initial_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


@pytest.fixture(autouse=True)
def _plain_settings() -> Iterator[None]:
    """What a test switches on ends with it; TF32 would hide differences."""
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.cuda.set_sync_debug_mode("default")
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.deterministic = False
    torch.backends.cudnn.allow_tf32 = True


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


def test_a_rank_waits_for_others_when_its_own_part_is_done() -> None:
    """Its host is ahead of it: the time of its own backward is none that others took."""
    model = initial_model(CONFIG, num_classes=NUM_CLASSES).cuda()
    strategy = Alone(CONFIG, FlatModel(model))
    strategy.join(None)
    sums = torch.ones(8, device="cuda")
    strategy.group.wait(strategy.group.all_reduce(sums))  # Connects.
    cuda: Any = torch.cuda  # Not all of it is typed.
    cuda._sleep(1_000_000_000)
    done = cuda.Event()
    done.record()
    work = strategy.group.all_reduce(sums)
    assert not done.query()
    strategy.group.wait_for_own()
    assert done.query()
    strategy.group.wait(work)
    strategy.group.leave()


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
