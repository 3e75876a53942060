"""The driver of a small run, in a process of its own that may end at any of its steps.

python -m tests.driver_process '{"strategy": "all_reduce", ...}', with the cluster in RAY_ADDRESS.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import ray

import xdist
from datapipe.batch import Batch
from tests.recorded import recorded_topology
from tests.small_runs import run
from tests.strategies import Wrapped
from xdist.computation import BatchSums
from xdist.config import TrainConfig
from xdist.plain_config import from_json
from xdist.topologies.push_pull import PushPullTopology, push_pull_strategy

PACKAGE = str(Path(xdist.__file__).parent)


@dataclass(frozen=True)
class Request:
    """One life of a run."""

    config: Mapping[str, Any]
    run_dir: str
    recording: str
    """A directory."""
    marker: str
    """An environment variable that all processes of the run have."""
    dies_at: int | None = None
    """The call of a function of xdist, in whichever thread, at which it gets SIGKILL."""


class CallCounter:
    """Counts the calls of functions of xdist in this process, from `start` on."""

    def __init__(self, dies_at: int | None) -> None:
        self.num_calls = 0
        self._dies_at = dies_at

    def start(self) -> None:
        threading.setprofile(self._see)
        sys.setprofile(self._see)

    def stop(self) -> None:
        threading.setprofile(None)
        sys.setprofile(None)

    def _see(self, frame: FrameType, event: str, _argument: object) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(PACKAGE):
            self.num_calls += 1
            if self.num_calls == self._dies_at:
                os.kill(os.getpid(), signal.SIGKILL)


class Committed(Wrapped):
    """Writes a line for each push that it knows to be committed."""

    def __init__(self, strategy: Any, *, directory: Path, number: int) -> None:
        super().__init__(strategy)
        self._path = directory / f"committed-{number}-{os.getpid()}.jsonl"

    def update(self, batch: Batch, sums: BatchSums) -> None:
        self.strategy.update(batch, sums)
        if self.strategy.is_dropped:
            return
        spans = [[span.epoch, span.start, span.stop] for span in batch.spans]
        line = {"version": self.strategy.progress.step, "spans": spans}
        with self._path.open("a") as file:
            file.write(json.dumps(line) + "\n")


def committed_strategy(directory: Path, *arguments: Any, number: int) -> Any:
    strategy = push_pull_strategy(*arguments, number=number)
    return Committed(strategy, directory=directory, number=number)


def topologies(request: Request) -> dict[str, Any]:
    directory = Path(request.recording)
    make_strategy = partial(committed_strategy, directory)
    servers = partial(PushPullTopology, make_strategy=make_strategy)
    return {**recorded_topology(directory), "push_pull": servers}


def main(request: Request) -> None:
    """Its last line: the number of calls."""
    variables = {request.marker: "1"}
    ray.init(log_to_driver=False, runtime_env={"env_vars": variables})
    counter = CallCounter(request.dies_at)
    config = from_json(TrainConfig, request.config)
    counter.start()
    run(config, Path(request.run_dir), topologies=topologies(request))
    counter.stop()
    sys.stdout.write(f"{counter.num_calls}\n")


if __name__ == "__main__":
    main(Request(**json.loads(sys.argv[1])))
