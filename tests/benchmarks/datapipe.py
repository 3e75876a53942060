"""Images a second, ours against webdataset, mosaicml-streaming and litdata, on the same images.

python -m tests.benchmarks.datapipe --source ../shared/data/imagenet-sample

Every pipeline decodes, crops and scales to 299 px as RandomResizedCrop does. Each runs in a process
of its own; they take turns, round after round. Per core: one process on one core, images per CPU
second. Wall clock: two cores, a stock DataLoader with two workers against two decode threads, both
to normalised float32. A ratio is the median of the rounds' ratios.

The last line is one JSON object. A peer that cannot be installed here is null in it, and the table
says why.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console
from rich.table import Table

from tests.benchmarks.peers.data_sets import (
    ROOT,
    NotMade,
    images_at_hand,
    link_images,
    pack,
    write_with,
)
from tests.benchmarks.peers.environments import PEERS, NotInstallable, python_of
from tests.benchmarks.peers.pixels import Difference, difference_to_pillow
from tests.benchmarks.peers.rounds import Rounds
from tests.benchmarks.peers.timing import Request, Speed

PIPELINE_LIMIT_S = 600


class PipelineFailed(Exception):
    """A process that was to time a pipeline did not; the last line of the text says why."""


@dataclass(frozen=True)
class Arguments:
    """The command line."""

    source: Path = field(default_factory=images_at_hand)
    """Folder of JPEGs."""
    copies: int = 5
    """How often each image is in the data sets."""
    shard_mb: int = 25
    """Megabytes of a shard; DataLoader's workers need one each."""
    rounds: int = 5
    """How often every pipeline is timed."""
    images: int = 1_100
    """Images that a pipeline is timed on, in each round."""
    warm_up_images: int = 384
    """Images that it gives before."""
    image_size: int = 299
    """Side of the crops."""
    batch_size: int = 64
    """Images a batch."""
    peers: bool = True
    """Compare with mosaicml-streaming and litdata too; makes their environments, once."""
    environments: Path = ROOT / "build" / "peers"
    """Where those are."""


@dataclass(frozen=True)
class Contender:
    """One pipeline that takes part."""

    name: str
    module: str
    variant: str
    data: str
    """Directory of its data set, in the one of all data sets."""
    num_cores: int = 1


CONTENDERS = (
    Contender("webdataset", "stock", "training", "plain"),
    Contender("mosaic", "mosaic", "training", "mosaic"),
    Contender("litdata", "litdata", "training", "litdata"),
    Contender("ours", "ours", "training", "marked"),
    Contender("ours_plain", "ours", "training", "plain"),
    Contender("ours_fallback", "ours", "training_without_kernel", "marked"),
    Contender("stock_evaluation", "stock", "evaluation", "plain"),
    Contender("ours_evaluation", "ours", "evaluation", "marked"),
    Contender("stock_float32", "stock", "float32", "plain", num_cores=2),
    Contender("ours_float32", "ours", "float32", "marked", num_cores=2),
)


def measured(arguments: Arguments, directory: Path, console: Console) -> tuple[Rounds, Difference]:
    """Make the data sets, then time everybody."""
    rounds = Rounds()
    images = directory / "images"
    num_images = link_images(arguments.source, images, copies=arguments.copies)
    console.print(f"{num_images} images are packed in {2 + len(PEERS) * arguments.peers} ways")
    for name, options in (("plain", ["--no-restart-markers"]), ("marked", [])):
        pack(images, directory / name, shard_mb=arguments.shard_mb, options=options)
    pythons = _peers_ready(arguments, directory, rounds.missing)
    difference = difference_to_pillow(
        [str(directory / "marked"), str(directory / "plain")],
        image_size=arguments.image_size,
        num_images=num_images // arguments.copies,
    )
    for number in range(arguments.rounds):
        # The other way round every second time: whoever comes first meets the warmer machine.
        for contender in CONTENDERS[:: -1 if number % 2 else 1]:
            if contender.name in rounds.missing:
                continue
            python = pythons.get(contender.module, Path(sys.executable))
            try:
                rounds.add(contender.name, _timed(contender, python, number, arguments, directory))
            except PipelineFailed as error:
                if contender.module not in pythons:
                    raise
                rounds.drop(contender.name, str(error).splitlines()[-1])
        console.print(f"round {number + 1} of {arguments.rounds}")
    return rounds, difference


def _peers_ready(
    arguments: Arguments, directory: Path, missing: dict[str, str]
) -> Mapping[str, Path]:
    """The interpreter of each peer that can run here; the others get an entry in `missing`."""
    pythons = {}
    for peer in PEERS:
        if not arguments.peers:
            missing[peer.name] = "not asked for"
            continue
        try:
            python = python_of(peer, arguments.environments.absolute())
            write_with(peer.name, python, directory / "images", directory / peer.name)
            pythons[peer.name] = python
        except (NotInstallable, NotMade) as error:
            missing[peer.name] = str(error)
    return pythons


def _timed(
    contender: Contender, python: Path, number: int, arguments: Arguments, directory: Path
) -> Speed:
    request = Request(
        variant=contender.variant,
        data=str(directory / contender.data),
        image_size=arguments.image_size,
        batch_size=arguments.batch_size,
        warm_up_images=arguments.warm_up_images,
        num_images=arguments.images,
        num_cores=contender.num_cores,
        seed=number,
    )
    module = f"tests.benchmarks.peers.{contender.module}"
    try:
        done = subprocess.run(
            [str(python), "-m", module, request.to_json()],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
            timeout=PIPELINE_LIMIT_S,
        )
    except subprocess.TimeoutExpired as error:
        raise PipelineFailed(f"{contender.name}: not done in {PIPELINE_LIMIT_S} s") from error
    if done.returncode:
        raise PipelineFailed(
            f"{contender.name} ended with {done.returncode}:\n{done.stderr.strip()}"
        )
    return Speed(**json.loads(done.stdout.splitlines()[-1]))


def figures(rounds: Rounds, difference: Difference) -> dict[str, Any]:
    """What the last line says."""
    return {
        "ratio_vs_webdataset": rounds.ratio_per_core("ours", "webdataset"),
        "ratio_plain_shards": rounds.ratio_per_core("ours_plain", "webdataset"),
        "ratio_fallback": rounds.ratio_per_core("ours_fallback", "webdataset"),
        "ratio_vs_stock_float32_wall": rounds.ratio_wall("ours_float32", "stock_float32"),
        "ratio_vs_stock_float32_cpu": rounds.ratio_per_core("ours_float32", "stock_float32"),
        "ratio_vs_mosaic": rounds.ratio_per_core("ours", "mosaic"),
        "ratio_vs_litdata": rounds.ratio_per_core("ours", "litdata"),
        "eval_ratio": rounds.ratio_per_core("ours_evaluation", "stock_evaluation"),
        "pixel_diff_mean": difference.mean,
        "webdataset_images_s": rounds.per_core("webdataset"),
        "mosaic_images_s": rounds.per_core("mosaic"),
        "litdata_images_s": rounds.per_core("litdata"),
        "ours_images_s": rounds.per_core("ours"),
        "ours_plain_images_s": rounds.per_core("ours_plain"),
        "ours_fallback_images_s": rounds.per_core("ours_fallback"),
        "stock_evaluation_images_s": rounds.per_core("stock_evaluation"),
        "ours_evaluation_images_s": rounds.per_core("ours_evaluation"),
        "stock_float32_wall_images_s": rounds.wall("stock_float32"),
        "ours_wall_images_s": rounds.wall("ours_float32"),
        "kernel": difference.kernel,
    }


def table_of(rounds: Rounds) -> Table:
    """For people."""
    table = Table(title="images a second")
    for column in ("pipeline", "a CPU second", "wall clock", "cores"):
        table.add_column(column, justify="left" if column == "pipeline" else "right")
    for contender in CONTENDERS:
        reason = rounds.missing.get(contender.name)
        if reason is not None:
            table.add_row(f"{contender.name}: {reason}", "-", "-", "-")
            continue
        per_core = f"{rounds.per_core(contender.name):.0f}"
        wall = f"{rounds.wall(contender.name):.0f}"
        table.add_row(contender.name, per_core, wall, str(contender.num_cores))
    return table


def main(arguments: Arguments) -> int:
    """Measure, and show it; 2, with one line on stderr, for what the user can mend."""
    console = Console(stderr=True)
    with tempfile.TemporaryDirectory(prefix="bench-datapipe-") as directory:
        try:
            rounds, difference = measured(arguments, Path(directory), console)
        except (NotMade, PipelineFailed) as error:
            sys.stderr.write(f"error: {error}\n")
            return 2
    Console().print(table_of(rounds))
    sys.stdout.write(json.dumps(figures(rounds, difference)) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Arguments, description=__doc__)))
