"""What asynchronous training learns: four workers on parameter servers, against one synchronous
worker with the same batch per update, learning rate and samples.

PYTHONPATH=jobs python -m tests.benchmarks.learning --seeds 0 1 2 --plot docs/learning-curves.png

Both are the preset `cifar` of the job jft_async, on CIFAR-10's images with the WordNet hypernyms of
their classes, and take turns, seed after seed. It finds the images below $XDIST_SHARED/data. The
last line is one JSON object: weighted MAP@100 of the averaged weights on held-out images.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from local_head import LocalHead
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter
from rich.console import Console
from rich.table import Table

from tests.benchmarks.peers.data_sets import ROOT
from tests.real_images import real_images
from xdist.charts import BLUE, GREY, ORANGE

ASYNCHRONOUS, SYNCHRONOUS = "asynchronous", "synchronous"
GENTLE_START = ("--servers.start-over-steps", "600")
"""Four workers that begin at once are behind most at the start: after two epochs of the first seed
they have 0.829, these about 0.85, and one synchronous worker 0.86.
"""
WAYS: Mapping[str, Sequence[str]] = {
    ASYNCHRONOUS: ("--strategy=push_pull", "--num-workers=4", "--num-servers=2", *GENTLE_START),
    SYNCHRONOUS: ("--strategy=all_reduce", "--num-workers=1"),
}
COLORS = {ASYNCHRONOUS: BLUE, SYNCHRONOUS: ORANGE}
NUM_CPUS = 5
"""By name: the machine needs not so many."""
TOLERANCE = 0.02
SCORE = "map100"


@dataclass(frozen=True)
class Arguments:
    """The command line."""

    seeds: tuple[int, ...] = (0, 1, 2)
    num_epochs: int = 10
    plot: Path | None = None
    """A PNG of the scores as they grew."""


Curve = list[tuple[int, float]]
"""Samples, and the score after them."""


@dataclass(frozen=True)
class Run:
    """What came of one."""

    curve: Curve
    prevalence: float
    """What a constant scorer has."""
    staleness: float | None
    """Updates between pull and push, in the mean."""

    @property
    def score(self) -> float:
        return self.curve[-1][1]


def packed(directory: Path) -> tuple[str, str]:
    """The shards of both sets."""
    shared = real_images()
    if not shared.is_dir():
        sys.exit(f"no real images in {shared}; set XDIST_SHARED to the directory above them")
    sets: list[str] = []
    for split in ("train", "test"):
        out = directory / split
        command = [sys.executable, str(ROOT / "jobs/pack_shards.py")]
        command += [str(shared / f"cifar10-{split}.tar"), str(out)]
        command += ["--label-map", str(shared / "cifar10_labels.json")]
        command += ["--labels", f"{sets[0]}/labels.json"] if sets else []
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        sets.append(str(out))
    return sets[0], sets[1]


def train(way: str, seed: int, head: LocalHead, sets: tuple[str, str], arguments: Arguments) -> Run:
    """One run of the job."""
    with tempfile.TemporaryDirectory(prefix="learning-") as directory:
        command = [sys.executable, str(ROOT / "jobs/jft_async.py"), "--preset", "cifar"]
        command += ["--data.train", sets[0], "--data.evaluation", sets[1], *WAYS[way]]
        command += ["--seed", str(seed), "--num-epochs", str(arguments.num_epochs)]
        subprocess.run(
            [*command, "--run-dir", directory],
            env=dict(head.environment),
            check=True,
            stdout=subprocess.DEVNULL,
        )
        lines = (Path(directory) / "metrics.jsonl").read_text().splitlines()
    return run_of([json.loads(line) for line in lines])


def run_of(records: Sequence[dict[str, Any]]) -> Run:
    scored = [
        record
        for record in records
        if record["kind"] == "evaluation" and record["weights"] == "average"
    ]
    stale = [record["staleness_mean"] for record in records if record["kind"] == "train"]
    stale = [value for value in stale if value is not None]
    return Run(
        [(record["samples"], record["scores"][SCORE]) for record in scored],
        scored[-1]["scores"][f"{SCORE}_prevalence"],
        statistics.mean(stale) if stale else None,
    )


def figures(runs: Mapping[str, Sequence[Run]]) -> dict[str, Any]:
    """What the last line says."""
    scores = {way: [run.score for run in of_way] for way, of_way in runs.items()}
    means = {way: statistics.mean(of_way) for way, of_way in scores.items()}
    stale = [run.staleness for run in runs[ASYNCHRONOUS] if run.staleness is not None]
    return {
        "map100_asynchronous": round(means[ASYNCHRONOUS], 4),
        "map100_synchronous": round(means[SYNCHRONOUS], 4),
        "map100_difference": round(means[ASYNCHRONOUS] - means[SYNCHRONOUS], 4),
        "map100_prevalence": round(runs[SYNCHRONOUS][0].prevalence, 4),
        "staleness_mean": round(statistics.mean(stale), 2),
        **{f"map100_each_{way}": [round(one, 4) for one in scores[way]] for way in scores},
    }


def draw(runs: Mapping[str, Sequence[Run]], file: Path) -> None:
    """Thin: each seed; strong: their mean."""
    figure = Figure(figsize=(9, 3.6), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    panel = figure.subplots()
    for way, of_way in runs.items():
        for run in of_way:
            panel.plot(*zip(*run.curve, strict=True), color=COLORS[way], alpha=0.3, linewidth=1)
        places = [samples for samples, _ in of_way[0].curve]
        means = [statistics.mean(run.curve[i][1] for run in of_way) for i in range(len(places))]
        label = f"{way}: {means[-1]:.3f}"
        panel.plot(places, means, color=COLORS[way], linewidth=2, marker="o", label=label)
    level = runs[SYNCHRONOUS][0].prevalence
    label = f"a constant scorer: {level:.3f}"
    panel.axhline(level, color=GREY, linestyle=":", linewidth=1.5, label=label)
    panel.set_ylabel("MAP@100")
    panel.set_xlabel("samples")
    panel.xaxis.set_major_formatter(EngFormatter(sep=""))
    panel.grid(alpha=0.3)
    panel.spines[["top", "right"]].set_visible(False)
    panel.legend(loc="lower right", fontsize="small")
    figure.savefig(file, format="png")


def main(arguments: Arguments) -> int:
    """Train all of them; 1 where asynchronous training learns less."""
    console = Console()
    runs: dict[str, list[Run]] = {way: [] for way in WAYS}
    variables = {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'jobs'}"}
    with tempfile.TemporaryDirectory(prefix="cifar-") as directory:
        sets = packed(Path(directory))
        with LocalHead(num_cpus=NUM_CPUS, variables=variables) as head:
            for seed in arguments.seeds:
                for way, of_way in runs.items():
                    of_way.append(train(way, seed, head, sets, arguments))
                    console.print(f"seed {seed}, {way}: {of_way[-1].score:.4f}")
                    sys.stdout.flush()
    values = figures(runs)
    table = Table(title="weighted MAP@100, averaged weights", show_header=False)
    for name, value in values.items():
        table.add_row(name, str(value))
    console.print(table)
    if arguments.plot is not None:
        draw(runs, arguments.plot)
    sys.stdout.write(json.dumps(values) + "\n")
    return int(values["map100_difference"] < -TOLERANCE)


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Arguments, description=__doc__)))
