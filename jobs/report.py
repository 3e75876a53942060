"""Curves, scores and events of one or several runs, as one page of HTML.

python jobs/report.py ~/xdist-runs/imagenet_sync-1a2b3c4d -o report.html
python jobs/report.py runs/baseline runs/wider s3://bucket/runs/deeper --pictures docs/
"""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass
from io import BytesIO
from typing import Annotated

import tyro

from datapipe.errors import DataError
from datapipe.storage import absolute, join, write_bytes
from xdist.charts import CHARTS, draw_together
from xdist.errors import XdistError
from xdist.report import distinct, page, read_run

DESCRIPTION = "Curves, scores and events of one or several runs, as one page of HTML."


@dataclass(frozen=True)
class Arguments:
    """The command line."""

    runs: tyro.conf.Positional[tuple[str, ...]]
    """Run directories, paths or URLs."""
    output: Annotated[str, tyro.conf.arg(aliases=["-o"])] = "report.html"
    """The page."""
    pictures: str | None = None
    """A directory, or its URL, for the charts as PNGs, too."""

    def __post_init__(self) -> None:
        if not self.runs:
            raise ValueError("no runs; give one or several run directories")


def run(arguments: Arguments) -> list[str]:
    """Report; the files that were written."""
    runs = distinct([read_run(absolute(run)) for run in arguments.runs])
    output = absolute(arguments.output)
    write_bytes(output, page(runs).encode())
    written = [output]
    records = {name: story.records for name, story in runs.items()}
    for chart in CHARTS if arguments.pictures is not None else ():
        picture = BytesIO()
        if draw_together(records, chart, picture, form="png"):
            url = join(absolute(str(arguments.pictures)), f"{chart.replace(' ', '-')}.png")
            write_bytes(url, picture.getvalue())
            written.append(url)
    return written


def main(arguments: list[str] | None = None) -> int:
    """0, or 2 with one line on stderr for what the user can mend."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    try:
        written = run(tyro.cli(Arguments, args=arguments, description=DESCRIPTION))
    except (DataError, XdistError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("written:", *written, sep="\n  ")
    return 0


if __name__ == "__main__":
    sys.exit(main())
