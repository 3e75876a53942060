"""The gradient of a linear layer on its way to a server: whole, or as the factors it is made of.

PYTHONPATH=jobs python -m tests.benchmarks.factors

The three large layers of the paper's JFT network (PAPER.md: two of 4,096 units and 17,000 outputs),
at a batch of 32, and one layer at more and more samples, where the factors grow and the product
does not. Timed: from the gradient to its values on a server in another process, through Ray's
object store, one after the other, in turns. Between two machines the bytes cost more than here, so
also timed is what a thread of the server multiplies: `xdist.strategies.factors.PRODUCT_FLOPS`
stands for that, and a table says up to which batch factors pay on which link.
The last line is one JSON object: how many times as long the whole gradient of each layer takes, the
same by the batch of one layer, and the operations a second of a thread.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import ray
import torch
import tyro
from local_head import LocalHead
from rich.console import Console
from rich.table import Table

from tests.benchmarks.async_launch import VARIABLES
from tests.benchmarks.peers.data_sets import ROOT
from xdist.product import Product
from xdist.wire import WireVector, as_vector

JFT_BATCH = 32
LAYERS = {"fc1": (4096, 2048), "fc2": (4096, 4096), "outputs": (17_000, 4096)}
"""(outputs, inputs)"""
SWEPT = "fc2"
BATCHES = (32, 128, 512, 1024, 2048)
"""Of the swept layer: up to as many bytes as the gradient has."""
LINKS_GBITS = (1, 10, 25, 100)


@dataclass(frozen=True)
class Arguments:
    """The command line."""

    rounds: int = 5
    """How often each way is timed; the median counts."""
    wire: Literal["float32", "bfloat16"] = "float32"
    """What is sent."""
    scale: float = 1.0
    """Of the sides of all layers."""


class Server:
    """What a parameter server does with what it gets, until it is staged."""

    def take(self, values: WireVector) -> int:
        """A gradient; nothing is left to do."""
        return len(values)

    def take_product(self, product: Product) -> int:
        """Factors: the gradient is computed."""
        return len(product.values())

    def product_flops(self, product: Product, rounds: int) -> float:
        """Floating-point operations a second of one thread."""
        torch.set_num_threads(1)
        found = medians({"product": product.values}, rounds)
        num_samples, num_rows = product.output_gradients.shape
        flop: float = 2.0 * num_samples * num_rows * product.inputs.shape[1]
        return flop / found["product"]


@dataclass(frozen=True)
class Gradient:
    """Of one layer, in both forms, on a worker."""

    gradient: torch.Tensor
    output_gradients: torch.Tensor
    inputs: torch.Tensor

    @classmethod
    def of(cls, rows: int, columns: int, num_samples: int) -> Gradient:
        output_gradients = torch.randn(num_samples, rows)
        inputs = torch.randn(num_samples, columns)
        return cls(output_gradients.t() @ inputs, output_gradients, inputs)

    @property
    def num_factors(self) -> int:
        """Floats in the factors."""
        return self.output_gradients.numel() + self.inputs.numel()

    def product(self, dtype: torch.dtype) -> Product:
        rows, columns = (as_vector(each.to(dtype)) for each in (self.output_gradients, self.inputs))
        return Product(rows, columns, 0, self.gradient.numel())

    def send(self, server: Any, dtype: torch.dtype) -> int:
        values = as_vector(self.gradient.view(-1).to(dtype))
        return int(ray.get(server.take.remote(ray.put(values))))

    def send_factors(self, server: Any, dtype: torch.dtype) -> int:
        return int(ray.get(server.take_product.remote(ray.put(self.product(dtype)))))


def medians(ways: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Seconds of each, in turns, after one that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(1 + rounds):
        for name, way in ways.items():
            started = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(found[1:]) for name, found in seconds.items()}


def measure(arguments: Arguments, console: Console) -> dict[str, Any]:
    """On the cluster whose address the environment holds."""
    dtype = torch.bfloat16 if arguments.wire == "bfloat16" else torch.float32
    ray.init(log_to_driver=False)
    server: Any = ray.remote(Server).remote()
    title = f"{arguments.wire} on the wire, {os.cpu_count()} cores"
    table = Table("layer", "batch", "MB whole", "MB factors", "ms whole", "ms factors", title=title)
    ratios: dict[str, float] = {}
    by_batch: dict[int, float] = {}
    flops: dict[int, float] = {}
    cases = [(name, JFT_BATCH) for name in LAYERS] + [(SWEPT, batch) for batch in BATCHES[1:]]
    for name, num_samples in cases:
        rows, columns = (max(1, round(side * arguments.scale)) for side in LAYERS[name])
        gradient = Gradient.of(rows, columns, max(1, round(num_samples * arguments.scale)))
        ways: dict[str, Callable[[], object]] = {
            "whole": partial(gradient.send, server, dtype),
            "factors": partial(gradient.send_factors, server, dtype),
        }
        found = medians(ways, arguments.rounds)
        ratio = found["whole"] / found["factors"]
        num_mb = gradient.gradient.numel() * dtype.itemsize / 1e6
        table.add_row(
            f"{name} {rows} x {columns}",
            str(len(gradient.inputs)),
            f"{num_mb:.1f}",
            f"{num_mb * gradient.num_factors / gradient.gradient.numel():.1f}",
            f"{found['whole'] * 1e3:.0f}",
            f"{found['factors'] * 1e3:.0f}",
        )
        if num_samples == JFT_BATCH:
            ratios[name] = ratio
        if name == SWEPT:
            by_batch[num_samples] = ratio
            measured = server.product_flops.remote(gradient.product(dtype), arguments.rounds)
            flops[num_samples] = ray.get(measured)
    console.print(table)
    console.print(_table_of_links(flops, dtype))
    ray.shutdown()
    return {
        **{f"{name}_ratio": ratio for name, ratio in ratios.items()},
        "ratio_by_batch": by_batch,
        "product_flops": flops[JFT_BATCH],
        "wire": arguments.wire,
    }


def _table_of_links(flops: dict[int, float], dtype: torch.dtype) -> Table:
    """For which batches a thread multiplies sooner than the bytes come that are spared."""
    table = Table("Gb/s", *map(str, flops), title="factors of fc2 pay, by the batch, with a thread")
    rows, columns = LAYERS[SWEPT]
    for gbits in LINKS_GBITS:
        cells = []
        for num_samples, rate in flops.items():
            num_spared = rows * columns - num_samples * (rows + columns)
            spared_s = dtype.itemsize * num_spared / (gbits * 1e9 / 8)
            cells.append("yes" if 2 * num_samples * rows * columns / rate <= spared_s else "no")
        table.add_row(f"{gbits:g}", *cells)
    return table


def main(arguments: Arguments) -> int:
    """Measure on a cluster of its own: in another process, as Ray reads its token once."""
    if "RAY_ADDRESS" in os.environ:
        result = measure(arguments, Console(stderr=True))
        sys.stdout.write(json.dumps(result) + "\n")
        return 0
    with LocalHead(num_cpus=2, variables=VARIABLES) as head:
        command = [sys.executable, "-m", "tests.benchmarks.factors", *sys.argv[1:]]
        return subprocess.call(command, cwd=ROOT, env=dict(head.environment))


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Arguments, description=__doc__)))
