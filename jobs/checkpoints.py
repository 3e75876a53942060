"""The checkpoints of a run: what they hold and scored, which stay, which can be read.

python jobs/checkpoints.py ~/xdist-runs/imagenet_sync-1a2b3c4d
python jobs/checkpoints.py s3://bucket/run --verify
python jobs/checkpoints.py s3://bucket/run --pin 120000 --unpin 80000
"""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass

import tyro
from rich.console import Console
from rich.table import Table

from datapipe.errors import DataError
from datapipe.storage import absolute
from xdist.errors import XdistError
from xdist.retention import pin, unpin
from xdist.standing import Standing, standing

DESCRIPTION = "The checkpoints of a run: what they hold and scored, which stay, which can be read."


@dataclass(frozen=True)
class Arguments:
    """The command line."""

    run: tyro.conf.Positional[str]
    """A run directory, path or URL."""
    pin: tuple[int, ...] = ()
    """Steps of checkpoints that the run is never to delete."""
    unpin: tuple[int, ...] = ()
    """Steps of those that it may delete again, unless checkpoint.keep_every pins them anew."""
    verify: bool = False
    """Read all of them, and compare their SHA-256."""

    def __post_init__(self) -> None:
        if both := sorted({*self.pin} & {*self.unpin}):
            raise ValueError(f"step {both[0]} is both in --pin and in --unpin; give it once")


def run(arguments: Arguments) -> list[Standing]:
    """Pin, unpin, and look."""
    run_dir = absolute(arguments.run)
    for step in arguments.pin:
        pin(run_dir, step)
    for step in arguments.unpin:
        unpin(run_dir, step)
    return standing(run_dir, verifies=arguments.verify)


def table_of(found: list[Standing]) -> Table:
    """A line for each, the oldest first."""
    table = Table("step", "samples", "epoch", "MiB", "scores", "")
    for each in found:
        cut = each.cut
        table.add_row(
            f"{each.step:,}",
            *((f"{cut.num_samples:,}", str(cut.position.epoch)) if cut else ("", "")),
            f"{each.num_bytes / 2**20:,.1f}" if cut else "",
            _scores(each),
            ", ".join(each.remarks),
        )
    return table


def _scores(each: Standing) -> str:
    return "\n".join(
        f"{name} {value:.4f} ({weights})"
        for weights, scores in each.scores.items()
        for name, value in scores.items()
    )


def main(arguments: list[str] | None = None) -> int:
    """0; 1 where one of them is damaged; 2 with one line on stderr for what the user can mend."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    try:
        found = run(tyro.cli(Arguments, args=arguments, description=DESCRIPTION))
    except (DataError, XdistError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    Console().print(table_of(found))
    damaged = [each for each in found if each.damage is not None]
    for each in damaged:
        print(f"damaged: {each.damage}", file=sys.stderr)
    return int(bool(damaged))


if __name__ == "__main__":
    sys.exit(main())
