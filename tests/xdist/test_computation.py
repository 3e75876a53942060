"""A batch's gradient, computed in each of the ways that a configuration can ask for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from datapipe.batch import Batch
from datapipe.config import DataConfig
from xdist.computation import BatchSums, Computation, make_loss
from xdist.compute_config import ComputeConfig
from xdist.config import TrainConfig
from xdist.errors import UserError
from xdist.flat import FlatModel
from xdist.part_loss import Part, PartLoss

NUM_CLASSES = 5
SIDE = 8
CONFIG = TrainConfig(
    data=DataConfig(train="nowhere", image_size=SIDE),
    strategy="all_reduce",
    loss="sigmoid",
    batch_size=4,
    num_epochs=1,
)


class Listener:
    """Keeps what it is told, and the sums of that moment."""

    def __init__(self) -> None:
        self.parameters: list[int] = []

    def begin(self, _batch: Batch, sums: BatchSums) -> None:
        assert self.parameters == []
        self.sums = sums.vector.clone()

    def gradient_ready(self, parameter: int) -> None:
        self.parameters.append(parameter)


class Observer:
    """Keeps the phases of a step."""

    def __init__(self) -> None:
        self.phases: list[str] = []

    def enter(self, phase: str) -> None:
        self.phases.append(phase)

    def end_step(self) -> None:
        self.phases.append("end")


def make_flat(*, dropout: float = 0.0, device: str = "cpu") -> FlatModel:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(dropout), nn.Linear(8, NUM_CLASSES),
    )  # fmt: skip
    return FlatModel(model.to(device).train())


def make_batch(counts: Sequence[int], *, lanes: Sequence[int] = ()) -> Batch:
    """Images with so many labels each; an image without labels counts too."""
    size = len(counts)
    generator = torch.Generator().manual_seed(size + sum(counts))
    label_ids = [torch.randperm(NUM_CLASSES, generator=generator)[:count] for count in counts]
    shape = (size, SIDE, SIDE, 3)
    return Batch(
        images=torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8),
        label_ids=torch.cat(label_ids),
        label_offsets=torch.tensor([0, *counts]).cumsum(0),
        sample_weights=torch.ones(size),
        sample_ids=torch.arange(size),
        spans=(),
        segment_sizes=tuple(lanes) or (size,),
        num_samples=size,
        corrupt=(),
    )


def with_compute(**values: Any) -> TrainConfig:
    return replace(CONFIG, compute=ComputeConfig(**values))


def compute_once(
    computation: Computation, batch: Batch, *, seed: int = 7, listener: Listener | None = None
) -> BatchSums:
    size = len(batch.sample_weights)
    return computation.compute(batch, seeds=(seed,), divisor=size, listener=listener or Listener())


def gradient_of(config: TrainConfig, flat: FlatModel, batch: Batch) -> tuple[Tensor, Tensor]:
    """The gradient, and the sums."""
    sums = compute_once(Computation(config, flat), batch)
    return flat.gradients.clone(), sums.vector.clone()


def test_bfloat16_is_for_forward_and_backward_alone() -> None:
    flat, batch = make_flat(), make_batch([1, 2, 0, 3])
    exact, sums = gradient_of(CONFIG, make_flat(), batch)
    seen: list[torch.dtype] = []
    flat.model.register_forward_hook(lambda _module, _inputs, logits: seen.append(logits.dtype))
    rounded, rounded_sums = gradient_of(with_compute(precision="bfloat16"), flat, batch)
    assert seen == [torch.bfloat16]
    assert rounded.dtype == rounded_sums.dtype == flat.weights.dtype == torch.float32
    # bfloat16 has 8 bits; single elements may be off by more where large terms cancel.
    assert (rounded - exact).norm() < 0.02 * exact.norm()
    assert 0 < (rounded_sums - sums).abs().max() < 0.02 * sums.abs().max()


@pytest.mark.parametrize("is_channels_last", [False, True])
def test_activations_are_channels_last_on_a_cpu_and_kernels_stay_in_the_flat_vector(
    is_channels_last: bool,
) -> None:
    flat = make_flat()
    seen: list[bool] = []
    flat.model[2].register_forward_hook(  # type: ignore[index]
        lambda _module, _inputs, output: seen.append(
            output.is_contiguous(memory_format=torch.channels_last)
        )
    )
    batch = make_batch([1, 2, 0, 3])
    gradient, _ = gradient_of(with_compute(channels_last=is_channels_last), flat, batch)
    assert seen == [True]
    assert torch.equal(gradient, gradient_of(CONFIG, make_flat(), batch)[0])
    first = next(flat.model.parameters())
    assert first.data_ptr() == flat.weights.data_ptr()
    flat.weights.add_(1.0)
    assert torch.equal(first.flatten(), flat.weights[: first.numel()])


@pytest.mark.parametrize("counts", [[1, 1, 1], [0, 0, 0], [2, 0, 1], [5, 4, 3], [0, 5, 0]])
@pytest.mark.parametrize(
    "config",
    [CONFIG, replace(CONFIG, loss="softmax"), replace(CONFIG, loss="softmax", label_smoothing=0.1)],
    ids=["sigmoid", "softmax", "smoothed"],
)
def test_labels_of_an_image_that_does_not_exist_change_nothing(
    counts: list[int], config: TrainConfig
) -> None:
    batch = make_batch(counts)
    part = Part(batch.images, batch.label_ids, batch.label_offsets, batch.sample_weights)
    loss = make_loss(config)
    # Static shapes are for what this machine need not have; their loss is computed anywhere.
    plain, filled_up = (
        PartLoss(ComputeConfig(cuda_graphs=is_static), make_flat(), loss=loss)
        for is_static in (False, True)
    )
    assert torch.equal(plain(part), filled_up(filled_up.prepare(part)))


def test_labels_are_filled_up_to_few_different_lengths_that_never_shrink() -> None:
    loss = PartLoss(ComputeConfig(compile=True), make_flat(), loss=make_loss(CONFIG))
    sizes = []
    for count in (0, 1, 3, 2, 5, 4, 0):
        batch = make_batch([count, count, count])
        part = Part(batch.images, batch.label_ids, batch.label_offsets, batch.sample_weights)
        filled_up = loss.prepare(part)
        assert torch.equal(filled_up.label_ids[: len(part.label_ids)], part.label_ids)
        assert torch.equal(filled_up.label_offsets[:-1], part.label_offsets)
        assert len(filled_up.label_ids) == filled_up.label_offsets[-1]
        sizes.append(len(filled_up.label_ids))
    assert sizes == [3, 3, 16, 16, 16, 16, 16]


def test_it_tells_its_observer_of_each_part() -> None:
    observer = Observer()
    computation = Computation(with_compute(accumulation_steps=2), make_flat(), observer=observer)
    compute_once(computation, make_batch([1, 1, 1, 1]))
    assert observer.phases == ["forward", "backward"] * 2


@pytest.mark.parametrize(("steps", "parts"), [(1, [2, 2, 1]), (2, [1] * 5)])
def test_more_images_than_usual_are_computed_in_more_parts_not_in_larger_ones(
    steps: int, parts: list[int]
) -> None:
    config, batch = with_compute(accumulation_steps=steps), make_batch([1, 2, 0, 3, 1])
    computation = Computation(config, make_flat(), most_images=2)
    assert sorted((stop - start for start, stop in computation._rows(batch)), reverse=True) == parts
    assert len(computation._rows(make_batch([1, 2]))) == steps


def test_cuda_graphs_without_a_gpu_are_refused() -> None:
    with pytest.raises(UserError, match="cuda_graphs is True; allowed: False for workers without"):
        Computation(with_compute(cuda_graphs=True), make_flat())


@pytest.mark.long
@pytest.mark.timeout(600)
def test_a_compiled_model_has_the_same_gradients_and_tells_of_each() -> None:
    """Whole, in parts of two sizes, and in lanes; with labels of any number."""
    compiled, plain = make_flat(), make_flat()
    for config, batch in (
        (CONFIG, make_batch([1, 2, 0, 3, 1])),
        (CONFIG, make_batch([5, 5, 5, 5, 1])),
        (with_compute(accumulation_steps=2), make_batch([1, 2, 0, 3, 1])),
        (replace(CONFIG, bn_group="lane"), make_batch([1, 2, 0, 3, 1, 2], lanes=(3, 3))),
    ):
        expected, sums = gradient_of(config, plain, batch)
        compute = replace(config.compute, compile=True)
        computation = Computation(replace(config, compute=compute), compiled)
        listener = Listener()
        compute_once(computation, batch, listener=listener)
        torch.testing.assert_close(compiled.gradients, expected, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(listener.sums, sums, rtol=1e-5, atol=1e-5)
        assert sorted(listener.parameters) == list(range(len(compiled.layout.parameters)))
        # Of this computation alone: each adds its hooks to the model.
        compiled, plain = make_flat(), make_flat()


@pytest.mark.by_hand
@pytest.mark.timeout(600)
def test_a_model_is_compiled_once_for_labels_of_any_number() -> None:
    flat = make_flat()
    computation = Computation(with_compute(compile=True), flat)
    counters = torch._dynamo.utils.counters["stats"]
    compute_once(computation, make_batch([5, 5, 5, 5]))
    before = counters["unique_graphs"]
    for counts in ([0, 0, 0, 0], [1, 2, 0, 3], [5, 4, 4, 4]):
        compute_once(computation, make_batch(counts))
    assert before > 0
    assert counters["unique_graphs"] == before


@pytest.mark.by_hand
@pytest.mark.timeout(600)
def test_dropout_of_a_compiled_model_is_a_function_of_the_seed() -> None:
    flat, batch = make_flat(dropout=0.5), make_batch([1, 2, 0, 3])
    computation = Computation(with_compute(compile=True), flat)
    gradients = []
    for seed in (1, 1, 2):
        compute_once(computation, batch, seed=seed)
        gradients.append(flat.gradients.clone())
    assert torch.equal(gradients[0], gradients[1])
    assert not torch.equal(gradients[0], gradients[2])
