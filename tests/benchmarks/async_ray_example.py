"""Ray's documented asynchronous parameter server, with RMSProp, and workers without compute.

https://docs.ray.io/en/latest/ray-core/examples/plot_parameter_server.html: there is one server; a
worker gets the weights as a dict of tensors and returns its gradients as a list of arrays; the
driver hands these to the server, and what it returns, the weights, back to that worker. Here the
gradients are the same every time, and nothing is scored.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
import torch
from torch import Tensor

from tests.benchmarks.async_workload import (
    DECAY,
    EPSILON,
    LEARNING_RATE,
    MOMENTUM,
    fixed_gradient,
    make_network,
)


@dataclass(frozen=True)
class Request:
    """One measurement."""

    seconds: float
    num_workers: int = 2
    width: float = 1.0
    """Of the Xception."""
    warm_up_s: float = 6.0
    """Before the clock starts."""


class ParameterServer:
    """Owns the model and its optimizer."""

    def __init__(self, width: float) -> None:
        self._model = make_network(width)
        self._optimizer = torch.optim.RMSprop(
            self._model.parameters(), lr=LEARNING_RATE, alpha=DECAY, eps=EPSILON, momentum=MOMENTUM
        )

    def apply_gradients(self, *gradients: list[Any]) -> dict[str, Tensor]:
        """Make an update of the sum of these; returns the weights after it."""
        sums = [np.stack(parts).sum(axis=0) for parts in zip(*gradients, strict=True)]
        self._optimizer.zero_grad()
        for parameter, gradient in zip(self._model.parameters(), sums, strict=True):
            parameter.grad = torch.from_numpy(gradient)
        self._optimizer.step()
        return self.get_weights()

    def get_weights(self) -> dict[str, Tensor]:
        return {name: value.cpu() for name, value in self._model.state_dict().items()}


class DataWorker:
    """Takes weights, and returns gradients."""

    def __init__(self, width: float, number: int) -> None:
        self._model = make_network(width)
        for parameter in self._model.parameters():
            parameter.grad = fixed_gradient(parameter, worker=number)

    def compute_gradients(self, weights: dict[str, Tensor]) -> list[Any]:
        self._model.load_state_dict(weights)
        gradients = (parameter.grad for parameter in self._model.parameters())
        return [None if gradient is None else gradient.cpu().numpy() for gradient in gradients]


def updates_per_second(request: Request) -> float:
    """Of the loop that the example's driver makes, on the cluster of this process."""
    server_class: Any = ray.remote(ParameterServer)
    worker_class: Any = ray.remote(DataWorker)
    server = server_class.remote(request.width)
    workers = [worker_class.remote(request.width, number) for number in range(request.num_workers)]
    weights = server.get_weights.remote()
    computing = {worker.compute_gradients.remote(weights): worker for worker in workers}

    def updates_in(seconds: float) -> float:
        """Updates a second, for so long."""
        started, num_updates = time.perf_counter(), 0
        while (passed := time.perf_counter() - started) < seconds:
            [ready], _ = ray.wait(list(computing))
            worker = computing.pop(ready)
            num_updates += 1
            weights = server.apply_gradients.remote(ready)
            computing[worker.compute_gradients.remote(weights)] = worker
        return num_updates / passed

    updates_in(request.warm_up_s)
    return updates_in(request.seconds)


def main(request: Request) -> None:
    """Measure it."""
    ray.init(log_to_driver=False)
    sys.stdout.write(json.dumps({"updates_per_s": updates_per_second(request)}) + "\n")


if __name__ == "__main__":
    main(Request(**json.loads(sys.argv[1])))
