"""Pack images into WebDataset shards with labels and an index.

python jobs/pack_shards.py photos/ shards/train
python jobs/pack_shards.py held-out/ shards/test --labels shards/train/labels.json
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from datapipe.errors import DataError
from datapipe.labels import read_labels
from datapipe.packing import LabelMap, PackReport, label_names, pack, shuffle_images
from datapipe.sources import ImageFile, list_images

DESCRIPTION = "Pack images into WebDataset shards with labels and an index, ready for training."


@dataclass(frozen=True)
class PackConfig:
    """What is packed, and how."""

    source: tyro.conf.Positional[Path]
    """A folder with a folder per class, a tar of one, or a .parquet or .csv table with columns path
    and labels (one label, a list, or several separated by spaces or ';')."""
    output: tyro.conf.Positional[str]
    """Directory or URL that the shards are written into."""
    label_map: Path | None = None
    """JSON file that gives each class its labels: {"class": ["label", ...]}."""
    labels: str | None = None
    """labels.json of another set, whose ids and weights are used; evaluation sets need it."""
    shard_mb: int = 256
    """Megabytes after which a shard ends."""
    limit: int | None = None
    """Pack only so many images, a random choice."""
    seed: int = 0
    """Seed of the order in which images are packed."""
    prefix: str = "train"
    """Shards are called <prefix>-00000.tar and so on."""
    skip_bad: bool = False
    """Leave out images that do not decode, and list them, instead of stopping at the first."""

    def __post_init__(self) -> None:
        for name, value in (("shard-mb", self.shard_mb), ("limit", self.limit)):
            if value is not None and value < 1:
                raise ValueError(f"--{name} is {value}; allowed: at least 1")
        if not self.prefix or "/" in self.prefix:
            raise ValueError(f"--prefix is {self.prefix!r}; allowed: a name without '/'")


def run(config: PackConfig) -> PackReport:
    """Pack what the config names, with a progress bar on stderr."""
    known_labels = read_labels(config.labels) if config.labels else None
    listing = list_images(config.source)
    if listing.left_out:
        print(f"left out: {listing.left_out_text()}", file=sys.stderr)
    images: Sequence[ImageFile] = listing.images
    if config.label_map is not None:
        images = LabelMap.read(config.label_map).apply(images)
    chosen = shuffle_images(images, seed=config.seed, limit=config.limit)
    columns = (TextColumn("packing"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("packing", total=len(chosen))
        return pack(
            chosen,
            directory=config.output,
            names=label_names(images),
            known_labels=known_labels,
            prefix=config.prefix,
            shard_bytes=config.shard_mb * 1_000_000,
            skip_bad=config.skip_bad,
            on_image=lambda: progress.advance(task),
        )


def main(arguments: list[str] | None = None) -> int:
    """0, or 2 with one line on stderr for what the user can mend."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        report = run(tyro.cli(PackConfig, args=arguments, description=DESCRIPTION))
    except (DataError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command starts over", file=sys.stderr)
        return 130
    for line in report.skipped:
        print(f"skipped {line}", file=sys.stderr)
    print(
        f"packed {report.index.num_samples} images with {len(report.labels)} labels into "
        f"{len(report.index.shards)} shards in {report.index.directory}; "
        f"skipped {len(report.skipped)}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
