"""A run under fire: a worker is killed every 20 seconds or so, for 20 minutes.

PYTHONPATH=jobs python -m tests.benchmarks.soak --minutes 20
PYTHONPATH=jobs python -m tests.benchmarks.soak --strategy push_pull --every-s 15

Two workers of a small network on real shards. At the end of a synchronous run every step must have
been made once, with the same weights on both, and every sample of each epoch must have been seen
once. Of an asynchronous one, whose servers are killed too, no version and no sample may have come
twice, and none may be missing but what a worker was killed over. The last line is one JSON object:
what was made, killed and lost, pauses, and the memory of the processes at the beginning and at the
end.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, dataclass
from typing import Literal

import tyro
from local_head import LocalHead
from rich.console import Console
from rich.table import Table

from tests.benchmarks.peers.data_sets import ROOT

NUM_WORKERS = 2
NUM_CPUS = 4
"""By name: the machine needs not so many."""


@dataclass(frozen=True)
class Arguments:
    """The command line."""

    minutes: float = 20.0
    """How long it trains."""
    strategy: Literal["all_reduce", "push_pull"] = "all_reduce"
    every_s: float = 20.0
    """Between two kills, in the mean; drawn evenly from half to one and a half of it."""
    server_every_s: float = 120.0
    """The same, of parameter servers."""
    seed: int = 0
    """Of the moments, and of whom they strike."""


def main(arguments: Arguments) -> int:
    """Train under fire, on a cluster of its own; 1 when something was lost."""
    variables = {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'jobs'}"}
    with LocalHead(num_cpus=NUM_CPUS, variables=variables) as head:
        run = subprocess.run(
            [sys.executable, "-m", "tests.benchmarks.soak_run", json.dumps(asdict(arguments))],
            env=head.environment,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        )
    if run.returncode != 0:
        sys.stderr.write("the run lost something, or failed: see above\n")
        return 1
    last = run.stdout.splitlines()[-1]
    table = Table(title=f"a kill every {arguments.every_s:g} s", show_header=False)
    for key, value in json.loads(last).items():
        table.add_row(key, f"{value:g}")
    Console().print(table)
    sys.stdout.write(last + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Arguments, description=__doc__)))
