"""The run of `tests.benchmarks.soak`, on the cluster of RAY_ADDRESS: its figures, as JSON.

python -m tests.benchmarks.soak_run ARGUMENTS
"""

from __future__ import annotations

import json
import os
import random
import signal
import statistics
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import ray

from tests.benchmarks import soak_servers
from tests.benchmarks.soak import NUM_WORKERS, Arguments
from tests.benchmarks.soak_parts import Ending, Memory, TimeIsUp, resident_mib
from tests.recorded import Recording, recorded_topology
from tests.small_runs import NUM_TRAIN, records, run, small_config
from xdist.config import CheckpointConfig, ClusterConfig


@dataclass
class Killer:
    """Kills one of the workers now and then, and notes how much memory all have."""

    directory: Path
    arguments: Arguments
    kills: int = 0
    memory: Memory = field(default_factory=Memory)
    over: threading.Event = field(default_factory=threading.Event)

    def work(self) -> None:
        """Until `over`."""
        draws = random.Random(self.arguments.seed)
        while not self.over.wait(self.arguments.every_s * draws.uniform(0.5, 1.5)):
            self.memory.note("driver", [os.getpid()])
            while len(workers := self.workers()) < NUM_WORKERS:  # The last one is spared.
                if self.over.wait(0.5):
                    return
            self.memory.note("worker", workers)
            os.kill(draws.choice(workers), signal.SIGKILL)
            self.kills += 1

    def workers(self) -> list[int]:
        """The processes that train."""
        names = (path.stem for path in sorted(self.directory.glob("worker-*.jsonl")))
        processes = (int(name.rsplit("-", 1)[1]) for name in names)
        return [process for process in processes if resident_mib(process) > 0]


def soak(arguments: Arguments, directory: Path) -> dict[str, float]:
    """One run; raises `AssertionError` where anything was lost or came twice."""
    config = replace(
        small_config(directory, strategy="all_reduce", num_workers=NUM_WORKERS),
        num_epochs=10**6,
        checkpoint=CheckpointConfig(every_samples=400, keep=2, evaluate_every=0),
        cluster=ClusterConfig(max_recoveries=10**6),
        report_every_steps=20,
    )
    recording = directory / "recording"
    make = recorded_topology(recording)["all_reduce"]
    deadline = time.monotonic() + 60 * arguments.minutes
    killer = Killer(recording, arguments)
    thread = threading.Thread(target=killer.work, daemon=True)
    thread.start()
    try:
        topologies = {"all_reduce": partial(Ending, make=make, deadline=deadline)}
        run(config, directory / "run", topologies=topologies)
    except TimeIsUp:
        pass
    finally:
        killer.over.set()
        thread.join()
    found = Recording(recording)
    steps = found.generations()
    num_again = sum(len(made_by) - 1 for made_by in steps.values())
    num_lost = num_again + max(steps) - len(steps)
    found.check(num_samples=NUM_TRAIN)
    pauses = [record["pause_s"] for record in records(directory / "run", "group")][1:]
    return {
        "steps": len(steps),
        "steps_lost": num_lost,
        "kills": killer.kills,
        "groups": len(pauses) + 1,
        "pause_s_median": round(statistics.median(pauses), 3),
        "pause_s_max": round(max(pauses), 3),
        **killer.memory.figures(),
    }


def main(arguments: Arguments) -> None:
    """Train under fire."""
    ray.init(log_to_driver=False)
    is_sync = arguments.strategy == "all_reduce"
    with tempfile.TemporaryDirectory(prefix="soak-") as directory:
        figures = (soak if is_sync else soak_servers.soak)(arguments, Path(directory))
    sys.stdout.write(json.dumps(figures) + "\n")


if __name__ == "__main__":
    main(Arguments(**json.loads(sys.argv[1])))
