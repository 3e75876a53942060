"""Pack images into WebDataset shards with labels and an index.

python jobs/pack_shards.py photos/ shards/train
python jobs/pack_shards.py held-out/ shards/test --labels shards/train/labels.json
python jobs/pack_shards.py ILSVRC2012_img_train.tar s3://bucket/train --recipe ilsvrc-train
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import tyro

from datapipe.errors import DataError
from datapipe.label_map import LabelMap
from datapipe.labels import read_labels
from datapipe.packing import (
    WHOLE,
    Packing,
    PackOptions,
    PackReport,
    Part,
    label_names,
    shuffle_images,
)
from datapipe.parallel_packing import OnImages, pack_shards
from datapipe.payloads import PayloadOptions
from datapipe.progress import progress_bar
from datapipe.recipes import Recipe, RecipeName
from datapipe.shard_packing import ShardJob, ShardRecord
from datapipe.sources import ImageFile

DESCRIPTION = "Pack images into WebDataset shards with labels and an index, ready for training."


@dataclass(frozen=True)
class PackConfig:
    """What is packed, and how."""

    source: tyro.conf.Positional[Path]
    """A folder with a folder per class, a tar of one, or a .parquet or .csv table with columns path
    and labels (one label, a list, or several separated by spaces or ';'), or what --recipe says."""
    output: tyro.conf.Positional[str]
    """Directory or URL that the shards are written into."""
    recipe: RecipeName | None = None
    """The source is a data set as it is downloaded. ilsvrc-train: ILSVRC2012_img_train.tar, the tar
    of a tar a class. ilsvrc-validation: ILSVRC2012_img_val.tar or a folder of its images; needs
    --ground-truth. open-images: a folder of <ImageID>.jpg; needs --image-labels."""
    ground_truth: Path | None = None
    """For ilsvrc-validation: ILSVRC2012_validation_ground_truth.txt of the development kit, with
    --meta, or a list with the synset (n01440764) of an image a line."""
    meta: Path | None = None
    """For ilsvrc-validation: meta.mat of the development kit, which says what the numbers of
    the ground truth are."""
    image_labels: Path | None = None
    """For open-images: the CSV file of labels that people verified (ImageID, Source, LabelName,
    Confidence). What was verified to be in the image becomes a label."""
    class_descriptions: Path | None = None
    """For open-images: the CSV file with a name for each LabelName; labels are then called
    "<LabelName> <name>"."""
    label_map: Path | None = None
    """JSON file that gives each class its labels: {"class": ["label", ...]}."""
    labels: str | None = None
    """labels.json of another set, whose ids and weights are used; evaluation sets need it."""
    shard_mb: int = 256
    """Megabytes after which a shard ends, as the images are in the source."""
    limit: int | None = None
    """Pack only so many images, a random choice."""
    seed: int = 0
    """Seed of the order in which images are packed."""
    prefix: str = "train"
    """Shards are called <prefix>-00000.tar and so on."""
    skip_bad: bool = False
    """Leave out images that do not decode, and list them, instead of stopping at the first."""
    restart_markers: bool = True
    """Give JPEGs restart markers, so that crops decode faster. Pixels stay as they are."""
    reencode_quality: int | None = None
    """Encode every image anew, as a JPEG of this quality (1 to 95). Pixels change."""
    reencode_long_side: int | None = None
    """With --reencode-quality: scale images down to so many pixels on their longer side."""
    num_processes: int | None = None
    """Shards that are written at a time; by default one a CPU core."""
    part: str | None = None
    """Write only a share of the shards, such as 3/8 for the third of eight: for several machines
    that see the same source. When all parts are done, the same command with --finish in place of
    --part makes a data set of them."""
    finish: bool = False
    """Write labels.json and the manifest, when all parts are done."""
    ray: bool = False
    """Write the shards on all nodes of the Ray cluster that this runs on (RAY_ADDRESS, or a job);
    all must see the source and the output."""

    def __post_init__(self) -> None:
        numbers = ("shard_mb", "limit", "num_processes")
        for name, value in ((name, getattr(self, name)) for name in numbers):
            if value is not None and value < 1:
                raise ValueError(f"--{name.replace('_', '-')} is {value}; allowed: at least 1")
        if self.finish and self.part is not None:
            raise ValueError("--part and --finish: give --finish alone, once all parts are done")
        if self.ray and (self.finish or self.num_processes is not None):
            option = "--finish" if self.finish else "--num-processes"
            raise ValueError(
                f"--ray and {option}: Ray writes one shard a CPU; leave one of them out"
            )
        self.pack_options()
        self.chosen_part()
        self.chosen_recipe()

    def pack_options(self) -> PackOptions:
        return PackOptions(
            prefix=self.prefix,
            shard_bytes=self.shard_mb * 1_000_000,
            payloads=PayloadOptions(
                self.restart_markers, self.reencode_quality, self.reencode_long_side
            ),
            skip_bad=self.skip_bad,
        )

    def chosen_part(self) -> Part:
        return WHOLE if self.part is None else Part.parse(self.part)

    def chosen_recipe(self) -> Recipe:
        return Recipe(
            self.recipe, self.ground_truth, self.meta, self.image_labels, self.class_descriptions
        )


def run(config: PackConfig) -> PackReport | None:
    """Pack what the config names, with a progress bar on stderr. None where parts are missing."""
    packing = begin(config)
    if not config.finish:
        write_missing(packing, config)
    return packing.finish() if config.part is None else None


def begin(config: PackConfig) -> Packing:
    """The packing that this command is about: what is in the source, and where it goes."""
    known_labels = None if config.labels is None else read_labels(config.labels)
    listing = config.chosen_recipe().list_images(config.source.absolute())
    if listing.left_out:
        print(f"left out: {listing.left_out_text()}", file=sys.stderr)
    images: Sequence[ImageFile] = listing.images
    if config.label_map is not None:
        images = LabelMap.read(config.label_map).apply(images)
    options = config.pack_options()
    return Packing(
        shuffle_images(images, seed=config.seed, limit=config.limit),
        directory=config.output,
        names=label_names(images),
        known_labels=known_labels,
        options=replace(options, payloads=options.payloads.available()),
    )


def write_missing(packing: Packing, config: PackConfig) -> None:
    """Write the shards of this part that are not there yet."""
    part = config.chosen_part()
    jobs = packing.jobs(part)
    num_images, num_missing = packing.num_images(part), sum(len(job.planned.images) for job in jobs)
    num_done = num_images - num_missing
    with progress_bar("packing", num_images, num_done=num_done) as advance:
        for _ in packed(jobs, config, advance):
            pass


def packed(
    jobs: Sequence[ShardJob], config: PackConfig, on_images: OnImages
) -> Iterator[ShardRecord]:
    if config.ray:
        from packing_on_ray import pack_shards_on_ray

        return pack_shards_on_ray(jobs, on_images=on_images)
    num_processes = config.num_processes or len(os.sched_getaffinity(0))
    return pack_shards(jobs, num_processes=num_processes, on_images=on_images)


def main(arguments: list[str] | None = None) -> int:
    """0, or 2 with one line on stderr for what the user can mend."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        config = tyro.cli(PackConfig, args=arguments, description=DESCRIPTION)
        report = run(config)
    except (DataError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on where it was", file=sys.stderr)
        return 130
    print(_part_text(config) if report is None else _text(report))
    return 0


def _part_text(config: PackConfig) -> str:
    return (
        f"packed part {config.part} into {config.output}; when all parts are packed, give the same "
        "command with --finish in place of --part"
    )


def _text(report: PackReport) -> str:
    for line in report.skipped:
        print(f"skipped {line}", file=sys.stderr)
    return (
        f"packed {report.index.num_samples} images with {len(report.labels)} labels into "
        f"{len(report.index.shards)} shards in {report.index.directory}; "
        f"skipped {len(report.skipped)}"
    )


if __name__ == "__main__":
    sys.exit(main())
