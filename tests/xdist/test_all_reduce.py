"""What the ranks of a real gloo group make of their gradients together."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn

from datapipe.batch import Batch
from datapipe.config import DataConfig
from datapipe.position import Position, Span
from xdist import checkpoint
from xdist.checkpoint import Cut, Manifest
from xdist.computation import BatchSums
from xdist.config import OptimizerConfig, TrainConfig
from xdist.flat import FlatModel
from xdist.segments import Dealing
from xdist.strategies.all_reduce import AllReduce, Membership
from xdist.strategies.group import Rendezvous, open_store

CONFIG = TrainConfig(
    data=DataConfig(train="somewhere"),
    strategy="all_reduce",
    loss="softmax",
    batch_size=9,
    num_epochs=1,
    optimizer=OptimizerConfig(learning_rate=0.5, momentum=0.9, l2=0.0),
)
NUM_SAMPLES = (5, 3, 0)
"""Of the ranks; each has three places, the last one only corrupt samples."""


def make_flat() -> FlatModel:
    torch.manual_seed(0)
    return FlatModel(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, momentum=0.25)))


def gradient_of(rank: int, size: int) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(rank))


def statistics_of(rank: int, size: int) -> Tensor:
    return torch.rand(size, generator=torch.Generator().manual_seed(100 + rank))


def make_batch(num_samples: int) -> Batch:
    none = torch.zeros(0)
    return Batch(none, none, none, none, none, (Span(0, 0, 3),), (3,), num_samples, ())


def make_strategy(flat: FlatModel, directory: str, url: str | None, **changes: Any) -> AllReduce:
    return AllReduce(
        replace(CONFIG, **changes),
        flat,
        checkpoint_url=url,
        run_dir=directory,
        own_address="127.0.0.1",
    )


def membership_of(rank: int, port: int, **changes: Any) -> Membership:
    whole = Membership(
        Rendezvous("127.0.0.1", port, generation=1),
        rank=rank,
        world_size=len(NUM_SAMPLES),
        dealing=Dealing(100, num_lanes=3, samples_per_lane=3),
        lanes=(rank,),
        step=0,
        position=Position(),
        senders={},
        timeout_s=30.0,
    )
    return replace(whole, **changes)


def update_once(rank: int, directory: str, url: str, port: int, changes: dict[str, Any]) -> None:
    """One rank, in a process of its own: one update, and a part of the checkpoint. The last rank
    gets its state from another.
    """
    flat = make_flat()
    is_last = rank == len(NUM_SAMPLES) - 1
    if is_last:
        flat.weights.zero_()
    strategy = make_strategy(flat, directory, None if is_last else url, **changes)
    strategy.join(membership_of(rank, port, senders={2: 1}))
    batch, sums = make_batch(NUM_SAMPLES[rank]), BatchSums(flat)
    sums.num_samples += NUM_SAMPLES[rank]
    if NUM_SAMPLES[rank]:
        sums.statistics.copy_(statistics_of(rank, len(flat.statistics)))
        sums.num_parts += 1
    strategy.begin(batch, sums)
    flat.gradients.copy_(gradient_of(rank, len(flat.gradients)) * NUM_SAMPLES[rank] / 9)
    for number in reversed(range(len(flat.layout.parameters))):
        strategy.gradient_ready(number)
    if rank == 1:
        strategy.request_stop()  # Too late for this step.
    strategy.update(batch, sums)
    progress = strategy.progress
    assert (progress.step, progress.num_samples) == (1, 9)
    assert not strategy.wants_stop
    strategy.save((rank, len(NUM_SAMPLES)))
    torch.save(
        [strategy.written(1).parts, flat.weights.clone()],
        f"{directory}/rank-{rank}.pt",
    )
    strategy.begin(batch, sums)
    strategy.update(batch, sums)
    assert strategy.wants_stop


def start_checkpoint(run_dir: Path, flat: FlatModel) -> checkpoint.Checkpoint:
    checkpoint.make_directory(str(run_dir))
    url = checkpoint.checkpoint_url(str(run_dir), 0)
    size = flat.layout.num_weights
    parts = (
        checkpoint.write_range(url, {"weights": flat.weights}, start=0, stop=size),
        checkpoint.write_statistics(url, {"statistics": torch.zeros_like(flat.statistics)}),
    )
    cut = Cut(0, 0, Position(), is_final=False)
    return checkpoint.publish(url, Manifest(cut, flat.layout, parts, {}, {}, {}))


CLIP_NORM = 0.5
CLIPS = replace(CONFIG.optimizer, clip_norm=CLIP_NORM)


@pytest.mark.parametrize("changes", [{}, {"compress_gradients": "bfloat16"}, {"optimizer": CLIPS}])
def test_an_update_weighs_the_ranks_by_samples_and_all_end_equal(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    flat = make_flat()
    start = start_checkpoint(tmp_path, flat)
    store = open_store("127.0.0.1")
    arguments = (str(tmp_path), start.url, store.port, changes)
    spawn(update_once, arguments, nprocs=len(NUM_SAMPLES))  # type: ignore[no-untyped-call]
    results = [torch.load(tmp_path / f"rank-{rank}.pt", weights_only=False) for rank in range(3)]
    assert all(torch.equal(weights, results[0][1]) for _, weights in results)
    weighted = [n * gradient_of(r, len(flat.weights)) for r, n in enumerate(NUM_SAMPLES)]
    gradient = torch.stack(weighted).sum(0) / sum(NUM_SAMPLES)
    assert gradient.norm() > CLIP_NORM
    if "optimizer" in changes:
        gradient *= CLIP_NORM / gradient.norm()
    expected = flat.weights - 0.5 * gradient
    is_rounded = "compress_gradients" in changes
    torch.testing.assert_close(results[0][1], expected, rtol=0, atol=2**-7 if is_rounded else 1e-6)
    assert is_rounded != torch.allclose(results[0][1], expected, rtol=0, atol=1e-6)
    parts = tuple(part for saved, _ in results for part in saved)
    cut = Cut(1, 9, Position(0, ((0, 9),)), is_final=False)
    url = checkpoint.checkpoint_url(str(tmp_path), 1)
    whole = checkpoint.publish(url, Manifest(cut, flat.layout, parts, {}, {}, {}))
    assert torch.equal(whole.read_range(0, len(flat.weights))["weights"], results[0][1])
    mean = torch.stack([statistics_of(r, len(flat.statistics)) for r in range(2)]).mean(0)
    torch.testing.assert_close(whole.read_statistics()["statistics"], 0.25 * mean)
