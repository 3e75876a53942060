"""One pipeline in a process of its own: warmed up, then timed.

A pipeline is a generator without an end, of the number of images in each of its batches.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Request:
    """What a process is to run; it gets this as JSON, as its only argument."""

    variant: str
    """Which of the module's pipelines."""
    data: str
    """Directory of the data set, in the pipeline's own format."""
    image_size: int
    batch_size: int
    warm_up_images: int
    """Images that go through before the clock starts."""
    num_images: int
    """Images that are timed; the last batch may bring a few more."""
    num_cores: int
    """Cores that the process may use."""
    seed: int

    def to_json(self) -> str:
        return json.dumps(asdict(self))


@dataclass(frozen=True)
class Speed:
    """What was measured."""

    images_per_cpu_s: float
    """Of CPU seconds of the process and its children, all threads together."""
    images_per_wall_s: float


Sizes = Generator[int]
Pipeline = Callable[[Request], Sizes]


def run_requested(pipelines: Mapping[str, Pipeline]) -> None:
    """Time the pipeline that the command line asks for; the last line of stdout is the `Speed`."""
    request = Request(**json.loads(sys.argv[1]))
    cores = sorted(os.sched_getaffinity(0))[: request.num_cores]
    os.sched_setaffinity(0, cores)
    torch.set_num_threads(1)
    torch.manual_seed(request.seed)
    with closing(pipelines[request.variant](request)) as batch_sizes:
        speed = _timed(batch_sizes, request)
    sys.stdout.write(f"\n{json.dumps(asdict(speed))}\n")
    sys.stdout.flush()


def _timed(batch_sizes: Sizes, request: Request) -> Speed:
    _take(batch_sizes, request.warm_up_images)
    cpu_s, wall_s = _cpu_s(), time.perf_counter()
    num_images = _take(batch_sizes, request.num_images)
    cpu_s, wall_s = _cpu_s() - cpu_s, time.perf_counter() - wall_s
    return Speed(num_images / cpu_s, num_images / wall_s)


def _cpu_s() -> float:
    """Spent so far; of each child that lives, to a hundredth."""
    ticks = 0
    for child in multiprocessing.active_children():
        fields = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return time.process_time() + ticks / os.sysconf("SC_CLK_TCK")


def _take(batch_sizes: Iterator[int], least: int) -> int:
    """Run the pipeline until it gave so many images; how many it gave."""
    num_images = 0
    while num_images < least:
        num_images += next(batch_sizes)
    return num_images
