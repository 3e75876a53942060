"""The parts of an update through Ray's object store, in processes on the cluster of RAY_ADDRESS.

python -m tests.benchmarks.object_store_parts '{"rounds": 15, "workers": 8, "processes": 2}'
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from statistics import mean, median
from typing import Any

import ray

from tests.benchmarks.async_pushes import Request, config_of
from tests.benchmarks.async_workload import fixed_gradient, make_network
from xdist import bfloat16, large_pages, wire
from xdist.flat import FlatModel
from xdist.state import RangeState
from xdist.strategies.outbox import Outbox
from xdist.update import Step

NAMES = ("gradient", "put", "pass_of_1", "pass_of_all", "widen")


class Parts:
    """One process."""

    def __init__(self, num_workers: int) -> None:
        request = Request(1.0, 1, servers={"wire": "bfloat16", "shared_memory": False})
        config = config_of(request)
        self._flat = flat = FlatModel(make_network(request.width))
        gradient = fixed_gradient(flat.gradients, worker=0)
        self._gradients = [entry.view(gradient) for entry in flat.layout.parameters]
        self._outbox = Outbox(config.servers, flat)
        self._outbox.keep()
        weights = large_pages.copy(flat.weights)
        self._state = RangeState.from_tensors(
            {"weights": weights},
            config=config.optimizer,
            start=0,
            stop=flat.layout.num_weights,
            l2_mask=flat.layout.l2_mask("kernels"),
        )
        self._sent = large_pages.copy(gradient.bfloat16())
        self._out = large_pages.copy(weights.bfloat16())
        self._num_workers = num_workers

    def timed(self, name: str, rounds: int) -> float:
        """Milliseconds of a part."""
        part: Callable[[], object] = getattr(self, name)
        part()
        seconds = []
        for _ in range(rounds):
            began = time.perf_counter()
            part()
            seconds.append(time.perf_counter() - began)
        return 1e3 * median(seconds)

    def gradient(self) -> None:
        """From where backward leaves it, rounded into what is sent."""
        self._outbox.begin()
        for number in reversed(range(len(self._gradients))):
            self._flat.collect(number, self._gradients[number], adds=False)

    def put(self) -> None:
        """Into the object store: a gradient, or the weights that answer it."""
        ray.put(wire.as_vector(self._sent))

    def pass_of_1(self) -> None:
        self._state.apply(self._step(), bfloat16_out=self._out, num_threads=1)

    def pass_of_all(self) -> None:
        steps = [self._step() for _ in range(self._num_workers)]
        self._state.apply(*steps, bfloat16_out=self._out, num_threads=1)

    def _step(self) -> Step:
        return Step(self._sent, learning_rate=1e-3, average_share=1e-3)

    def widen(self) -> None:
        """The answer, where the worker computes with it."""
        bfloat16.widen(self._out, self._flat.weights, num_threads=1)


def main(asked: dict[str, int]) -> None:
    """Milliseconds of a core for each part, on stdout."""
    ray.init(log_to_driver=False)
    process: Any = ray.remote(num_cpus=1)(Parts)
    processes = [process.remote(asked["workers"]) for _ in range(asked["processes"])]
    cost_ms = {
        name: mean(ray.get([each.timed.remote(name, asked["rounds"]) for each in processes]))
        for name in NAMES
    }
    sys.stdout.write(json.dumps(cost_ms) + "\n")


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
