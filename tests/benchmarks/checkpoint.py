"""How long training stands still for a checkpoint: ours, torch.save with fsync, Ray Train's report.

PYTHONPATH=jobs python -m tests.benchmarks.checkpoint --rounds 3

The state is that of the full Xception under RMSProp: weights, mean squares and momentum, 274 MB. In
each round all save it several times to the same disk, between updates that touch all of it; the
systems take turns, round after round; a ratio is the median of the rounds' ratios of medians.

The last line is one JSON object: the two ratios, seconds of each, seconds of our first copy, whose
memory was found beside the steps before it, write_mb_s (how fast our writer is) and
resume_s (from nothing to verified tensors in place).
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import tyro
from local_head import LocalHead
from rich.console import Console
from rich.table import Table

from tests.benchmarks.limits import missed
from tests.benchmarks.peers.data_sets import ROOT
from tests.benchmarks.peers.environments import RAY_TRAIN as RAY_TRAIN_PACKAGES
from tests.benchmarks.peers.environments import packages_of, python_of

OURS, RAY_TRAIN = "checkpoint_ours", "checkpoint_ray_train"
SMALLEST = {"stall_ratio_vs_torch_save": 3.0}
OTHERS = ("stall_ratio_vs_ray_train", "write_mb_s", "resume_s")
LIMIT_S = 600


@dataclass(frozen=True)
class Arguments:
    """The command line."""

    rounds: int = 3
    """How often every system takes its turn."""
    saves: int = 5
    """Checkpoints of each, in a round."""
    threads: int = 1
    """Of torch, in all of them."""
    environments: Path = Path("build/peers")
    """Where the packages of peers are installed; once."""


Seconds = Mapping[str, list[float]]


def main(arguments: Arguments) -> int:
    """Measure, and print; 1 where a limit is missed."""
    console = Console(stderr=True)
    ray_train = packages_of(python_of(RAY_TRAIN_PACKAGES, arguments.environments.absolute()))
    variables = {
        "OMP_NUM_THREADS": str(arguments.threads),
        "PYTHONPATH": f"{ROOT}:{ROOT / 'jobs'}:{ray_train}",
    }
    rounds: list[Seconds] = []
    with LocalHead(num_cpus=2, variables=variables) as head:
        for number in range(arguments.rounds):
            found: dict[str, list[float]] = {}
            for system in (OURS, RAY_TRAIN):
                found |= measured(system, arguments.saves, head.environment)
                console.print(f"{number + 1} of {arguments.rounds}: {system}")
            rounds.append(found)
    values = figures(rounds)
    Console().print(table_of(values))
    sys.stdout.write(json.dumps(values) + "\n")
    broken = missed(values, smallest=SMALLEST, largest={}, others=OTHERS)
    for line in broken:
        console.print(line, style="red")
    return int(bool(broken))


def measured(system: str, saves: int, environment: Mapping[str, str]) -> Seconds:
    """What one turn of a system took, by name."""
    with tempfile.TemporaryDirectory(prefix="xdist-bench-") as directory:
        result = Path(directory) / "result.json"
        subprocess.run(
            [sys.executable, "-m", f"tests.benchmarks.{system}", directory, str(saves)],
            cwd=ROOT,
            env=dict(environment),
            stdout=sys.stderr,
            timeout=LIMIT_S,
            check=True,
        )
        found: Seconds = json.loads(result.read_text())
        return found


def figures(rounds: list[Seconds]) -> dict[str, float | None]:
    """The medians of all rounds, and of the rounds' ratios."""

    def ratio(name: str) -> float:
        return median(median(each[name]) / median(each["stall_s"]) for each in rounds)

    def seconds(name: str) -> float:
        return median(median(each[name]) for each in rounds)

    megabytes = rounds[0]["megabytes"][0]
    return {
        "stall_ratio_vs_torch_save": ratio("torch_save_s"),
        "stall_ratio_vs_ray_train": ratio("ray_train_s"),
        "write_mb_s": megabytes / seconds("write_s"),
        "resume_s": seconds("resume_s"),
        "stall_s": seconds("stall_s"),
        "first_stall_s": seconds("first_stall_s"),
        "torch_save_s": seconds("torch_save_s"),
        "ray_train_s": seconds("ray_train_s"),
        "megabytes": megabytes,
    }


def table_of(values: Mapping[str, float | None]) -> Table:
    table = Table(title="a checkpoint", show_header=False)
    for name, value in values.items():
        table.add_row(name, "-" if value is None else f"{value:.3g}")
    return table


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Arguments, description=__doc__)))
