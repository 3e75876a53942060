"""Workers of which one takes four times as long for a step: runs of the driver, in which waiting
stands for computing, on the cluster of RAY_ADDRESS.

What a worker would do alone is measured in a run of its own, with servers.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import ray

from tests.benchmarks.async_figures import ALONE, ASYNCHRONOUS, SYNCHRONOUS
from tests.benchmarks.async_log import SKIPPED_STEPS, Logged, PushLog, Waits, updates_per_second
from tests.small_runs import run, small_config
from xdist.config import CheckpointConfig
from xdist.topologies.all_reduce import AllReduceTopology, all_reduce_strategy
from xdist.topologies.push_pull import PushPullTopology, push_pull_strategy

StrategyName = Literal["push_pull", "all_reduce"]
SAMPLES_OF_A_WORKER = 4
FEWEST_STEPS = 6
"""Of each worker, those included that do not count."""


@dataclass(frozen=True)
class Request:
    """All runs."""

    seconds: float
    """That each of them trains, about."""
    num_workers: int = 4
    step_s: float = 0.5
    slow_step_s: float = 2.0

    @property
    def waits(self) -> list[float]:
        """Of each worker, the slow one last."""
        return [self.step_s] * (self.num_workers - 1) + [self.slow_step_s]


def waiting_strategy(
    make_strategy: Any,
    waits: Sequence[float],
    log: PushLog,
    *arguments: Any,
    number: int,
    **named: Any,
) -> Any:
    strategy = make_strategy(*arguments, number=number, **named)
    return Logged(Waits(strategy, waits[number]), log, number=number)


def rate_of(strategy: StrategyName, waits: Sequence[float], *, seconds: float) -> float:
    """Updates a second of workers that wait so long in each, one another's in all_reduce too."""
    is_sync = strategy == "all_reduce"
    step_s = max(waits)
    seconds = max(seconds, FEWEST_STEPS * step_s)
    num_steps = seconds / step_s if is_sync else sum(seconds / wait_s for wait_s in waits)
    with tempfile.TemporaryDirectory(prefix="bench-async-") as name:
        directory = Path(name)
        log = PushLog(f"{directory}/log")
        config = replace(
            small_config(directory, strategy=strategy),
            batch_size=SAMPLES_OF_A_WORKER * (len(waits) if is_sync else 1),
            num_epochs=10**6,
            max_steps=SKIPPED_STEPS + round(num_steps),
            num_workers=len(waits),
            num_servers="auto" if is_sync else 1,
            checkpoint=CheckpointConfig(every_samples=10**6, evaluate_every=0),
        )
        topology, make_strategy = (
            (AllReduceTopology, all_reduce_strategy)
            if is_sync
            else (PushPullTopology, push_pull_strategy)
        )
        waiting = partial(waiting_strategy, make_strategy, list(waits), log)
        run(
            config,
            directory / "run",
            topologies={strategy: partial(topology, make_strategy=waiting)},
        )
        return updates_per_second(log.read())


def measured(request: Request) -> dict[str, float]:
    """Updates a second: of all workers together in both ways, and the sum of what they do alone."""
    fast_alone, slow_alone = (
        rate_of("push_pull", [wait_s], seconds=request.seconds / 2)
        for wait_s in (request.step_s, request.slow_step_s)
    )
    return {
        ALONE: fast_alone * (request.num_workers - 1) + slow_alone,
        ASYNCHRONOUS: rate_of("push_pull", request.waits, seconds=request.seconds),
        SYNCHRONOUS: rate_of("all_reduce", request.waits, seconds=request.seconds),
    }


def main(request: Request) -> None:
    """Measure them."""
    ray.init(log_to_driver=False)
    sys.stdout.write(json.dumps(measured(request)) + "\n")


if __name__ == "__main__":
    main(Request(**json.loads(sys.argv[1])))
