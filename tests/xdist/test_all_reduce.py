"""What the ranks of a real gloo group make of their gradients together."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn

from datapipe.batch import Batch
from datapipe.config import DataConfig
from datapipe.position import Position, Span
from xdist import checkpoint
from xdist.checkpoint import Cut, Manifest
from xdist.config import OptimizerConfig, TrainConfig
from xdist.flat import FlatModel
from xdist.strategies.all_reduce import AllReduce, Rendezvous, open_store

CONFIG = TrainConfig(
    data=DataConfig(train="somewhere"),
    strategy="all_reduce",
    loss="softmax",
    batch_size=8,
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


def update_once(rank: int, directory: str, url: str, port: int) -> None:
    """One rank, in a process of its own: one update, and a part of the checkpoint."""
    flat = make_flat()
    strategy = AllReduce(
        CONFIG,
        flat,
        rank=rank,
        world_size=len(NUM_SAMPLES),
        rendezvous=Rendezvous("127.0.0.1", port, generation=1),
        checkpoint_url=url,
        run_dir=directory,
    )
    flat.gradients.copy_(gradient_of(rank, len(flat.gradients)))
    flat.statistics.copy_(statistics_of(rank, len(flat.statistics)))
    strategy.update(make_batch(NUM_SAMPLES[rank]))
    progress = strategy.progress
    assert (progress.step, progress.num_samples) == (1, 9)
    torch.save([strategy.save(), flat.weights.clone()], f"{directory}/rank-{rank}.pt")


def start_checkpoint(run_dir: Path, flat: FlatModel) -> checkpoint.Checkpoint:
    url = checkpoint.checkpoint_url(str(run_dir), 0)
    size = flat.layout.num_weights
    parts = (
        checkpoint.write_range(url, {"weights": flat.weights}, start=0, stop=size),
        checkpoint.write_statistics(url, {"statistics": torch.zeros_like(flat.statistics)}),
    )
    cut = Cut(0, 0, Position(), is_final=False)
    return checkpoint.publish(url, Manifest(cut, flat.layout, parts, {}, {}, {}))


def test_an_update_weighs_the_ranks_by_samples_and_all_end_equal(tmp_path: Path) -> None:
    flat = make_flat()
    start = start_checkpoint(tmp_path, flat)
    store = open_store("127.0.0.1")
    arguments = (str(tmp_path), start.url, store.port)
    spawn(update_once, arguments, nprocs=len(NUM_SAMPLES))  # type: ignore[no-untyped-call]
    results = [torch.load(tmp_path / f"rank-{rank}.pt", weights_only=False) for rank in range(3)]
    assert all(torch.equal(weights, results[0][1]) for _, weights in results)
    weighted = [n * gradient_of(r, len(flat.weights)) for r, n in enumerate(NUM_SAMPLES)]
    gradient = torch.stack(weighted).sum(0) / sum(NUM_SAMPLES)
    torch.testing.assert_close(results[0][1], flat.weights - 0.5 * gradient)
    parts = tuple(part for saved, _ in results for part in saved)
    cut = Cut(1, 9, Position(0, ((0, 9),)), is_final=False)
    url = checkpoint.checkpoint_url(str(tmp_path), 1)
    whole = checkpoint.publish(url, Manifest(cut, flat.layout, parts, {}, {}, {}))
    assert torch.equal(whole.read_range(0, len(flat.weights))["weights"], results[0][1])
    mean = torch.stack([statistics_of(r, len(flat.statistics)) for r in range(3)]).mean(0)
    torch.testing.assert_close(whole.read_statistics()["statistics"], 0.25 * mean)
