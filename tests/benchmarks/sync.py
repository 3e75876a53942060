"""Synchronous training, ours against torchrun and Ray Train: speed, first step, a killed worker.

PYTHONPATH=jobs python -m tests.benchmarks.sync --rounds 3

All train the full Xception at 71 px, two images a worker and step, two workers of one thread, with
SGD over gloo, and save as often. In each run one worker is killed before it applies the step that
follows the first `--steps`; another run of ours has a spare worker for that. The systems take
turns, round after round; a ratio is the median of the rounds' ratios. The peers read images from
memory, ours decodes them from shards.

The last line is one JSON object. What a system could not do is null in it, and the table's notes
say why.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import torch
import tyro
from rich.console import Console

from tests.benchmarks.peers import environments
from tests.benchmarks.peers.data_sets import ROOT
from tests.benchmarks.peers.environments import NotInstallable, packages_of, python_of
from tests.benchmarks.sync_data import write_data
from tests.benchmarks.sync_figures import (
    OURS,
    OURS_SPARE,
    RAY_TRAIN,
    RUNS,
    TORCHRUN,
    Measured,
    Rounds,
    figures,
    missed,
    table_of,
)
from tests.benchmarks.sync_launch import RunFailed, System, run
from tests.benchmarks.sync_request import NUM_WORKERS, Request


@dataclass(frozen=True)
class Arguments:
    """The command line."""

    rounds: int = 3
    """How often every system is run."""
    steps: int = 35
    """Steps that are finished before a worker is killed."""
    save_every_steps: int = 10
    """Steps between two checkpoints, for all."""
    steps_after: int = 6
    """Steps that the peers make after the last checkpoint that is behind them."""
    steps_to_grow: int = 60
    """Steps that ours makes after the kill, in which it must be back at full size."""
    kill_rank: int = 1
    """Rank of the worker that is killed."""
    environments: Path = ROOT / "build" / "peers"
    """Where what only Ray Train imports is installed, once."""


@dataclass(frozen=True)
class Bench:
    """What all runs share."""

    arguments: Arguments
    directory: Path
    """Holds the shards in `data`, and each run's files while it lasts."""
    ray_train_packages: str

    def timed(self, name: str) -> Measured:
        """One run of that name. Raises `RunFailed`."""
        measure = {
            TORCHRUN: self.torchrun,
            RAY_TRAIN: self.ray_train,
            OURS: self.ours,
            OURS_SPARE: self.ours_with_spare,
        }
        with tempfile.TemporaryDirectory(prefix=f"{name}-", dir=self.directory) as directory:
            return measure[name](Path(directory))

    def torchrun(self, directory: Path) -> Measured:
        """Steady steps, a kill, a restart of all from the last snapshot."""
        system = System("torchrun", needs_ray=False)
        return self._run(system, directory, self.arguments.steps_after)

    def ray_train(self, directory: Path) -> Measured:
        """Steady steps, a kill, a restart of all from the last checkpoint."""
        system = System("ray_train", needs_ray=True, packages=self.ray_train_packages)
        return self._run(system, directory, self.arguments.steps_after)

    def ours(self, directory: Path) -> Measured:
        """Steady steps, a kill, steps of the survivor, and growth to full size by a new worker."""
        return self._run(System("ours", needs_ray=True), directory, self.arguments.steps_to_grow)

    def ours_with_spare(self, directory: Path) -> Measured:
        """The same with a worker that waits for that."""
        system = System("ours", needs_ray=True)
        return self._run(system, directory, self.arguments.steps_to_grow, num_spares=1)

    def _run(
        self, system: System, directory: Path, num_steps_after: int, *, num_spares: int = 0
    ) -> Measured:
        checkpoints = directory / "checkpoints"
        checkpoints.mkdir()
        request = Request(
            log=str(directory / "steps"),
            directory=str(checkpoints),
            data=str(self.directory / "data"),
            num_steps=self.arguments.steps + num_steps_after,
            save_every_steps=self.arguments.save_every_steps,
            kill_rank=self.arguments.kill_rank,
            kill_step=self.arguments.steps + 1,
            cluster={"num_spares": num_spares} if num_spares else {},
        )
        return Measured.of(run(system, request, num_cpus=NUM_WORKERS + num_spares))


def measured(arguments: Arguments, directory: Path, console: Console) -> Rounds:
    """Write the shards, then run everybody, in turns."""
    write_data(directory / "data")
    python = python_of(environments.RAY_TRAIN, arguments.environments.absolute())
    bench = Bench(arguments, directory, packages_of(python))
    rounds = Rounds()
    for number in range(arguments.rounds):
        rounds.begin()
        # The other way round every second time: whoever comes first meets the warmer machine.
        for name in RUNS[:: -1 if number % 2 else 1]:
            try:
                rounds.add(name, bench.timed(name))
            except RunFailed as error:
                rounds.fail(name, str(error))
                console.print(str(error), style="red", markup=False)
            console.print(f"round {number + 1} of {arguments.rounds}: {name}")
    return rounds


def machine() -> Mapping[str, Any]:
    """Where it was measured."""
    return {
        "cores": len(os.sched_getaffinity(0)),
        "torch": torch.__version__,
        "ray": ray.__version__,
    }


def main(arguments: Arguments) -> int:
    """Measure, and show it; 1 when a limit is missed, 2 for what the user can mend."""
    with tempfile.TemporaryDirectory(prefix="bench-sync-") as directory:
        try:
            rounds = measured(arguments, Path(directory), Console(stderr=True))
        except NotInstallable as error:
            sys.stderr.write(f"error: {error}\n")
            return 2
    values = figures(rounds)
    console = Console()
    console.print(table_of(rounds))
    console.print(" ".join(f"{name}={value}" for name, value in machine().items()))
    for name, reason in rounds.failures.items():
        console.print(f"{name}: {reason.splitlines()[-1]}", style="red", markup=False)
    for line in missed(values):
        console.print(line, style="red")
    sys.stdout.write(json.dumps({**values, **machine()}) + "\n")
    return 1 if missed(values) else 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Arguments, description=__doc__)))
