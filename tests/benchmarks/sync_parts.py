"""Where a step of bench-sync goes: its parts in one process alone, and the all-reduce between two.

python -m tests.benchmarks.sync_parts

One thread a process. The last line is one JSON object, of milliseconds: medians.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
import tyro
from torch import Tensor
from torch.nn import functional as F

from tests.benchmarks.sync_request import LEARNING_RATE, MOMENTUM, NUM_WORKERS, WEIGHT_DECAY
from tests.benchmarks.sync_workload import batches_in_memory, make_network, make_sgd
from xdist.flat import FlatModel
from xdist.optim import SGD
from xdist.update import Step, Update

BUCKET_FLOATS = 25 * 2**20 // 4
"""What DistributedDataParallel sends at once by default."""


@dataclass(frozen=True)
class Arguments:
    """The command line."""

    repeats: int = 20
    """How often each part is timed."""


def alone(repeats: int) -> dict[str, float]:
    """The parts that need no other process."""
    images, labels = next(batches_in_memory(0))
    model = make_network().train()
    flat = FlatModel(model)
    size = flat.layout.num_weights
    ours = SGD(momentum=MOMENTUM, l2=WEIGHT_DECAY, l2_mask=torch.ones(size))
    update = Update(flat.weights, [Step(flat.gradients, LEARNING_RATE)])
    separate = make_network().train()
    foreach = make_sgd(separate)
    torch.autograd.backward(F.cross_entropy(separate(images), labels))

    def loss() -> Tensor:
        return F.cross_entropy(model(images), labels)

    return {
        "forward_ms": median_ms(loss, repeats),
        "forward_backward_ms": median_ms(lambda: torch.autograd.backward(loss()), repeats),
        "sgd_foreach_ms": median_ms(foreach.step, repeats),
        "sgd_flat_ms": median_ms(lambda: ours.step(update), repeats),
        "zero_flat_ms": median_ms(flat.gradients.zero_, repeats),
        "scale_flat_ms": median_ms(lambda: flat.gradients.mul_(0.5), repeats),
    }


def together(repeats: int, num_floats: int) -> dict[str, float]:
    """All-reduces of a whole gradient."""
    gradients = torch.ones(num_floats)
    half = gradients.bfloat16()

    def in_buckets() -> None:
        buckets = torch.split(gradients, BUCKET_FLOATS)
        handles = [dist.all_reduce(bucket, async_op=True) for bucket in buckets]
        for handle in handles:
            assert handle is not None
            handle.wait()

    return {
        "all_reduce_ms": median_ms(lambda: dist.all_reduce(gradients), repeats),
        "all_reduce_buckets_ms": median_ms(in_buckets, repeats),
        "all_reduce_bf16_ms": median_ms(lambda: dist.all_reduce(half), repeats),
    }


def median_ms(part: Callable[[], object], repeats: int) -> float:
    """Of all calls but the first two."""
    seconds = []
    for _ in range(repeats + 2):
        started = time.perf_counter()
        part()
        seconds.append(time.perf_counter() - started)
    return round(1000 * statistics.median(seconds[2:]), 1)


def time_parts(rank: int, directory: str, repeats: int) -> None:
    """What each process runs; the other one waits while rank 0 is alone."""
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    store = dist.FileStore(f"{directory}/store", NUM_WORKERS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=NUM_WORKERS)
    parts = alone(repeats) if rank == 0 else {}
    dist.barrier()
    num_floats = sum(parameter.numel() for parameter in make_network().parameters())
    parts.update(together(repeats, num_floats))
    dist.destroy_process_group()
    if rank == 0:
        sys.stdout.write(json.dumps({"num_floats": num_floats, **parts}) + "\n")


def main(arguments: Arguments) -> int:
    """Time them, and show it; 1 when a process failed."""
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory(prefix="bench-sync-parts-") as directory:
        context = multiprocessing.get_context("spawn")
        processes = [
            context.Process(target=time_parts, args=(rank, directory, arguments.repeats))
            for rank in range(NUM_WORKERS)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
    return 1 if any(process.exitcode for process in processes) else 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Arguments, description=__doc__)))
