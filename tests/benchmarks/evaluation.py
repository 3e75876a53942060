"""Time and memory of weighted MAP@100 on drawn scores, batch after batch, in one process.

python -m tests.benchmarks.evaluation --images 1000000 --classes 6000

Its last line is one JSON object: images, classes, k, seconds, peak_mib, map100. peak_mib is the
most memory that the whole process ever held, torch itself included; seconds leave out the drawing.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor

from xdist.evaluation import MeanAveragePrecision

LABELS_PER_IMAGE = 3
SIGNAL = 2.5
"""A label's score is drawn from a normal distribution that is so much higher than the others'."""


@dataclass(frozen=True)
class Arguments:
    """The command line."""

    images: int = 1_000_000
    """Images."""
    classes: int = 6_000
    """Classes, all of them scored for every image."""
    k: int = 100
    """Classes that an image retrieves."""
    batch_size: int = 64
    """Images a batch."""
    seed: int = 0
    """Of scores and labels."""


def batches(arguments: Arguments) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Logits, label ids and label offsets."""
    generator = torch.Generator().manual_seed(arguments.seed)
    for start in range(0, arguments.images, arguments.batch_size):
        size = min(arguments.batch_size, arguments.images - start)
        logits = torch.randn(size, arguments.classes, generator=generator)
        shape = (size, LABELS_PER_IMAGE)
        labels = torch.randint(arguments.classes, shape, generator=generator)
        logits.scatter_add_(1, labels, torch.full(shape, SIGNAL))
        yield logits, labels.ravel(), torch.arange(size + 1) * LABELS_PER_IMAGE


def peak_mib() -> float:
    """The most memory that this process ever held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


@dataclass
class Figures:
    """What was measured; memory is the most that the process ever held, until then."""

    map100: float
    drawing_s: float
    updating_s: float
    computing_s: float
    mib_before: float
    peak_mib: float


def measured(arguments: Arguments) -> Figures:
    """Take all batches, then compute."""
    weights = np.random.default_rng(arguments.seed).random(arguments.classes)
    measure = MeanAveragePrecision(weights, k=arguments.k)
    times = [time.perf_counter()]
    updating_s = mib_before = 0.0
    for batch in batches(arguments):
        mib_before = mib_before or peak_mib()
        before = time.perf_counter()
        measure.update(*batch, torch.ones(len(batch[0])))
        updating_s += time.perf_counter() - before
    times.append(time.perf_counter())
    [score, _] = measure.compute().values()
    times.append(time.perf_counter())
    taking_s, computing_s = np.diff(times).tolist()
    return Figures(score, taking_s - updating_s, updating_s, computing_s, mib_before, peak_mib())


def table_of(arguments: Arguments, figures: Figures) -> Table:
    """For people."""
    grown = (figures.peak_mib - figures.mib_before) * 2**20 / arguments.images
    table = Table(
        title=f"MAP@{arguments.k}: {arguments.images} images, {arguments.classes} classes"
    )
    table.add_column("what")
    table.add_column("value", justify="right")
    table.add_row("drawing scores, s", f"{figures.drawing_s:.1f}")
    table.add_row("taking batches, s", f"{figures.updating_s:.1f}")
    table.add_row("ranking the classes, s", f"{figures.computing_s:.1f}")
    table.add_row("peak memory of the process, MiB", f"{figures.peak_mib:.0f}")
    table.add_row("of that before the first batch was taken, MiB", f"{figures.mib_before:.0f}")
    table.add_row("growth, bytes an image", f"{grown:.0f}")
    table.add_row("score", f"{figures.map100:.6f}")
    return table


def main(arguments: Arguments) -> None:
    """Measure, and show it."""
    torch.set_num_threads(1)
    figures = measured(arguments)
    Console().print(table_of(arguments, figures))
    values = {
        "images": arguments.images,
        "classes": arguments.classes,
        "k": arguments.k,
        "seconds": round(figures.updating_s + figures.computing_s, 1),
        "peak_mib": round(figures.peak_mib),
        "map100": figures.map100,
    }
    sys.stdout.write(json.dumps(values) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))
