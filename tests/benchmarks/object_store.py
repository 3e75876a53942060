"""What an update through Ray's object store is made of, each part alone: what the machine allows.

PYTHONPATH=jobs python -m tests.benchmarks.object_store

As many processes as there are cores do the same part at the same time, one thread each, so that
they share the memory's bandwidth as workers and servers do. The parts are those of bench-async's
`ours_object_store`: bfloat16 on the wire, RMSProp with an average, the whole Xception. Its last
line is one JSON object: milliseconds of a core for each part, and the updates a second that all
cores could make of these if they never waited, where a pass makes one update, and where it makes
as many as there are workers.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass

import tyro
from local_head import LocalHead
from rich.console import Console
from rich.table import Table

from tests.benchmarks.peers.data_sets import ROOT


@dataclass(frozen=True)
class Arguments:
    """The command line."""

    rounds: int = 15
    """Times that each part is done; the median counts."""
    workers: int = 8
    """Pushes that a pass may make at once."""


def main(arguments: Arguments) -> None:
    variables = {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'jobs'}"}
    num_cores = len(os.sched_getaffinity(0))
    asked = json.dumps({**asdict(arguments), "processes": num_cores})
    with LocalHead(num_cpus=num_cores, variables=variables) as head:
        measured = subprocess.run(
            [sys.executable, "-m", "tests.benchmarks.object_store_parts", asked],
            env=head.environment,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            check=True,
            text=True,
        )
    cost_ms: dict[str, float] = json.loads(measured.stdout.splitlines()[-1])
    values = figures(cost_ms, num_workers=arguments.workers, num_cores=num_cores)
    table = Table(title=f"an update through the object store, {num_cores} cores", show_header=False)
    for name, value in values.items():
        table.add_row(name, f"{value:.1f}")
    Console().print(table)
    sys.stdout.write(json.dumps(values) + "\n")


def figures(cost_ms: dict[str, float], *, num_workers: int, num_cores: int) -> dict[str, float]:
    """With the ceilings. A pass is answered by one copy of the weights, which all its workers
    read.
    """
    of_worker = cost_ms["gradient"] + cost_ms["put"] + cost_ms["widen"]
    alone = of_worker + cost_ms["pass_of_1"] + cost_ms["put"]
    together = of_worker + (cost_ms["pass_of_all"] + cost_ms["put"]) / num_workers
    return {
        **{f"{name}_ms": value for name, value in cost_ms.items()},
        "ceiling_one_a_pass": 1e3 * num_cores / alone,
        "ceiling_all_a_pass": 1e3 * num_cores / together,
    }


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))
