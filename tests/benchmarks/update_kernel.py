"""An update of all weights of the Xception, and of their average: one pass, against torch's ways.

python -m tests.benchmarks.update_kernel

RMSProp with momentum, an L2 penalty on the kernels, and the average, in turns, on one core and on
as many as there are; the fastest round of each counts. torch_foreach is the same formula, to the
same bits, by torch's operations on lists; torch_optim those that torch.optim has for lists, whose
products and sums are fused; torch_flat the latter on whole vectors. The last line is one JSON
object: updates a second of each way on all cores and on one (`_1`), and how many times those of a
way of torch, on whichever of these it is faster, the pass makes on all.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor

from xdist import large_pages
from xdist.flat import FlatModel
from xdist.model_config import ModelConfig
from xdist.models import build_model
from xdist.native_update import is_available
from xdist.optim import RMSProp
from xdist.update import Step, Update

LEARNING_RATE, MOMENTUM, DECAY, EPSILON, L2, SHARE = 0.045, 0.9, 0.9, 1.0, 4e-5, 1e-3
VECTORS_READ, VECTORS_WRITTEN = 5, 4
"""Weights, momentum, mean square, average; read: gradients too."""


@dataclass(frozen=True)
class Arguments:
    """The command line."""

    rounds: int = 10
    """How often each way makes an update on one core and on all; the fastest counts."""
    width: float = 1.0
    """Of the Xception; 1 has 22.9 million weights."""


@dataclass(frozen=True)
class Way:
    """A way to make the update."""

    update: Callable[[], None]
    num_bytes: int | None = None
    """Read and written, if it is one pass."""


class Vectors:
    """What an update reads and writes, of all weights, on the same pages for all ways."""

    def __init__(self, width: float) -> None:
        model = build_model(ModelConfig(width=width), num_classes=1000, head_bias=0.0, seed=0)
        self.layout = FlatModel(model).layout
        generator = torch.Generator().manual_seed(0)
        size = self.layout.num_weights
        self.weights, self.gradients, self.average = (
            large_pages.copy(torch.randn(size, generator=generator) * 0.01) for _ in range(3)
        )
        self.momentum, self.mean_square = map(
            large_pages.copy, (torch.zeros(size), torch.ones(size))
        )
        self.l2_mask = self.layout.l2_mask("kernels")

    def parts(self, vector: Tensor) -> list[Tensor]:
        """One a parameter: first `num_others`, then the kernels, which have the penalty."""
        others_first = sorted(self.layout.parameters, key=lambda entry: len(entry.shape) > 1)
        return [entry.view(vector) for entry in others_first]

    @property
    def num_others(self) -> int:
        return sum(len(entry.shape) <= 1 for entry in self.layout.parameters)


def one_pass(vectors: Vectors, gradients: Tensor) -> Way:
    """Ours."""
    optimizer = RMSProp(
        momentum=MOMENTUM, decay=DECAY, epsilon=EPSILON, l2=L2, l2_mask=vectors.l2_mask
    )
    step = Step(gradients, LEARNING_RATE, average_share=SHARE)
    update = Update(vectors.weights, [step], average=vectors.average)
    num_float_vectors = VECTORS_READ - 1 + VECTORS_WRITTEN
    num_bytes = gradients.nbytes + num_float_vectors * vectors.weights.nbytes
    return Way(lambda: optimizer.step(update), num_bytes)


def foreach(vectors: Vectors) -> Way:
    """The operations of `RMSProp.step_block` and `fold_block`, each on all parameters."""
    parts = vectors.parts
    weights, average, momentum = map(parts, (vectors.weights, vectors.average, vectors.momentum))
    gradients, mean_square = parts(vectors.gradients), parts(vectors.mean_square)
    l2 = parts(vectors.l2_mask * L2)

    def update() -> None:
        steps = torch._foreach_add(gradients, torch._foreach_mul(weights, l2))
        deviations = torch._foreach_mul(steps, steps)
        torch._foreach_sub_(deviations, mean_square)
        torch._foreach_mul_(deviations, 1 - DECAY)
        torch._foreach_add_(mean_square, deviations)
        torch._foreach_mul_(steps, LEARNING_RATE)
        roots = torch._foreach_add(mean_square, EPSILON)
        torch._foreach_rsqrt_(roots)
        torch._foreach_mul_(steps, roots)
        torch._foreach_mul_(momentum, MOMENTUM)
        torch._foreach_add_(momentum, steps)
        torch._foreach_sub_(weights, momentum)
        changes = torch._foreach_sub(weights, average)
        torch._foreach_mul_(changes, SHARE)
        torch._foreach_add_(average, changes)

    return Way(update)


def optim(vectors: Vectors) -> Way:
    """The operations of torch.optim.RMSprop(foreach=True) and of torch.optim.swa_utils; epsilon and
    learning rate are where TensorFlow has them.
    """
    parts, num_others = vectors.parts, vectors.num_others
    weights, average, momentum = map(parts, (vectors.weights, vectors.average, vectors.momentum))
    gradients, mean_square = parts(vectors.gradients), parts(vectors.mean_square)

    def update() -> None:
        kernels, of_kernels = weights[num_others:], gradients[num_others:]
        penalized = torch._foreach_add(of_kernels, kernels, alpha=L2)
        all_gradients = [*gradients[:num_others], *penalized]
        torch._foreach_mul_(mean_square, DECAY)
        torch._foreach_addcmul_(mean_square, all_gradients, all_gradients, 1 - DECAY)
        roots = torch._foreach_add(mean_square, EPSILON)
        torch._foreach_sqrt_(roots)
        torch._foreach_mul_(momentum, MOMENTUM)
        torch._foreach_addcdiv_(momentum, all_gradients, roots, LEARNING_RATE)
        torch._foreach_sub_(weights, momentum)
        torch._foreach_lerp_(average, weights, SHARE)

    return Way(update)


def flat(vectors: Vectors) -> Way:
    """As `optim`, on whole vectors and without new memory."""
    weights, gradients, l2 = vectors.weights, vectors.gradients, vectors.l2_mask * L2
    momentum, mean_square, average = vectors.momentum, vectors.mean_square, vectors.average
    penalized, roots = torch.empty_like(weights), torch.empty_like(weights)

    def update() -> None:
        torch.addcmul(gradients, weights, l2, out=penalized)
        mean_square.mul_(DECAY).addcmul_(penalized, penalized, value=1 - DECAY)
        torch.add(mean_square, EPSILON, out=roots).sqrt_()
        momentum.mul_(MOMENTUM).addcdiv_(penalized, roots, value=LEARNING_RATE)
        weights.sub_(momentum)
        average.lerp_(weights, SHARE)

    return Way(update)


def updates_per_second(
    ways: dict[str, Way], numbers_of_threads: list[int], rounds: int
) -> dict[tuple[str, int], float]:
    """Of each way and number of threads, in its fastest round."""
    seconds = {(name, number): float("inf") for name in ways for number in numbers_of_threads}
    for _ in range(rounds):
        for name, number in seconds:
            torch.set_num_threads(number)
            started = time.perf_counter()
            ways[name].update()
            seconds[name, number] = min(seconds[name, number], time.perf_counter() - started)
    return {key: 1 / value for key, value in seconds.items()}


def main(arguments: Arguments) -> None:
    if not is_available():
        raise SystemExit("native/update.c is not built; pip install . builds it with a compiler")
    console = Console(stderr=True)
    vectors = Vectors(arguments.width)
    ways = {
        "kernel": one_pass(vectors, vectors.gradients),
        "kernel_bfloat16": one_pass(vectors, vectors.gradients.bfloat16()),
        "torch_foreach": foreach(vectors),
        "torch_optim": optim(vectors),
        "torch_flat": flat(vectors),
    }
    num_cores = len(os.sched_getaffinity(0))
    rates = updates_per_second(ways, sorted({1, num_cores}), arguments.rounds)
    best = {name: max(rates[name, 1], rates[name, num_cores]) for name in ways}
    title = f"{len(vectors.weights) / 1e6:.1f} M weights"
    table = Table("way", "cores", "updates/s", "GB/s", "x torch_foreach", title=title)
    for (name, number), rate in rates.items():
        num_bytes = ways[name].num_bytes
        gigabytes = "" if num_bytes is None else f"{rate * num_bytes / 1e9:.1f}"
        ratio = rate / best["torch_foreach"]
        table.add_row(name, str(number), f"{rate:.1f}", gigabytes, f"{ratio:.2f}")
    console.print(table)
    result = {
        "kernel_ratio_vs_torch": rates["kernel", num_cores] / best["torch_foreach"],
        "kernel_ratio_vs_torch_optim": rates["kernel", num_cores] / best["torch_optim"],
        **{f"{name}_updates_s": rates[name, num_cores] for name in ways},
        **{f"{name}_updates_s_1": rates[name, 1] for name in ways},
        "num_weights": len(vectors.weights),
        "num_cores": num_cores,
    }
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Arguments))
