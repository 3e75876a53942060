"""Packing: images from a source -> shards, with label names turned into ids.

Images are packed in an order shuffled by a seed, so that every block of a shard is a mixture. The
same images, labels and options give the same bytes, however many processes and parts share the
work, and whether it was interrupted or not: a shard that is there and fits the plan is not written
again.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field

import numpy as np

from datapipe.errors import NUM_LISTED, PackingError
from datapipe.hashing import key_of
from datapipe.index import UNFINISHED_NAME, ShardIndex, write_manifest
from datapipe.label_map import require_known
from datapipe.labels import LABELS_NAME, Label, write_labels
from datapipe.order import Permutation
from datapipe.packing_directory import begin, check_apart
from datapipe.packing_plan import LabelledImage, PackPlan, make_plan
from datapipe.payloads import PayloadOptions
from datapipe.shard_packing import RECORDS_NAME, ShardJob, ShardRecord, record_url
from datapipe.sources import ImageFile
from datapipe.storage import (
    absolute,
    join,
    names_in,
    remove,
    remove_directory,
    sizes_in,
)
from datapipe.writer import index_of, shard_name

PACKING_KEY = 5
NUM_READERS = 16
"""Records that are read at a time: storage answers slowly, but many at once."""


@dataclass(frozen=True)
class PackOptions:
    """How images are packed."""

    prefix: str = "train"
    """Shards are called <prefix>-00000.tar and so on."""
    shard_bytes: int = 256_000_000
    """A shard ends once its images, as they are in the source, take so many."""
    payloads: PayloadOptions = field(default_factory=PayloadOptions)
    skip_bad: bool = False
    """Leave out images that do not decode, instead of stopping at the first."""

    def __post_init__(self) -> None:
        if not self.prefix or "/" in self.prefix:
            raise ValueError(f"--prefix is {self.prefix!r}; allowed: a name without '/'")


@dataclass(frozen=True)
class Part:
    """One of `count` shares of the shards; the first is number 1."""

    number: int
    count: int

    @staticmethod
    def parse(text: str) -> Part:
        match = re.fullmatch(r"(\d+)/(\d+)", text)
        part = Part(int(match[1]), int(match[2])) if match else Part(0, 0)
        if not 1 <= part.number <= part.count:
            raise ValueError(f"--part is {text!r}; allowed: i/n with i from 1 to n, such as 3/8")
        return part

    def holds(self, shard: int) -> bool:
        return shard % self.count == self.number - 1


WHOLE = Part(1, 1)


@dataclass
class PackReport:
    """What was packed; `skipped` names each bad image and why."""

    index: ShardIndex
    labels: tuple[Label, ...]
    skipped: list[str] = field(default_factory=list)


def label_names(images: Sequence[ImageFile]) -> list[str]:
    """The labels of these images, in the order of their ids: by number if all are numbers, else by
    name.
    """
    names = sorted({label for image in images for label in image.labels})
    return sorted(names, key=int) if all(name.isdecimal() for name in names) else names


def shuffle_images(images: Sequence[ImageFile], *, seed: int, limit: int | None) -> list[ImageFile]:
    """The images in a seeded order, at most `limit` of them."""
    permutation = Permutation(len(images), key_of(seed, PACKING_KEY))
    numbers = permutation(np.arange(len(images), dtype=np.int64))[:limit]
    return [images[number] for number in numbers.tolist()]


class Packing:
    """A data set that is being packed into a directory, as one command sees it.

    The directory holds the plan, as its mark, from the beginning to the end. `jobs` are the shards
    that are missing; they may be done in any order and anywhere, by calling `pack_shard` with each.
    `finish` then makes a data set of it.
    """

    def __init__(
        self,
        images: Sequence[ImageFile],
        *,
        directory: str,
        names: Sequence[str],
        known_labels: Sequence[Label] | None,
        options: PackOptions,
    ) -> None:
        """Labels get ids in the order of `names`, and as weight their share of the packed images;
        or both are those of `known_labels`.

        Writes the mark. Errors: `PackingError` for no images, for a label that is not known, for
        images that lie in `directory`, and if that holds something else; `OSError`.
        """
        self.directory = absolute(directory)
        self._options = options
        self._known_labels = known_labels
        if known_labels is not None:
            names = [label.name for label in known_labels]
        self._ids = {name: number for number, name in enumerate(names)}
        if not images:
            raise PackingError(f"{self.directory}: no images to pack")
        check_apart(images, directory)
        used = {name for image in images for name in image.labels}
        require_known(used, self._ids, "the labels given")
        self.plan = begin(self.directory, self._make_plan(images))
        self._fingerprint = self.plan.fingerprint()

    def jobs(self, part: Part = WHOLE) -> list[ShardJob]:
        """The shards of a part that are not there, or not as this command wants them."""
        wanted = [number for number in range(self.plan.num_shards) if part.holds(number)]
        return [
            self._job(number)
            for number, record in zip(wanted, self._records(wanted), strict=True)
            if record is None or (record.skipped and not self._options.skip_bad)
        ]

    def num_images(self, part: Part = WHOLE) -> int:
        """How many images a part has."""
        numbers = range(self.plan.num_shards)
        return sum(len(self.plan.shard(n).images) for n in numbers if part.holds(n))

    def finish(self) -> PackReport:
        """Write labels.json and the manifest, and take the mark away.

        Errors: `PackingError` if a shard is missing, or no image could be used; `OSError`.
        """
        records = self._all_records()
        skipped = [reason for record in records for reason in record.skipped]
        if skipped and not self._options.skip_bad:
            raise PackingError(f"{skipped[0]}; it was left out: give --skip-bad here, too")
        index = index_of(self.directory, [record.shard for record in records])
        if not index.num_samples:
            raise PackingError(f"{self.directory}: no image can be used; the first: {skipped[0]}")
        labels = self._known_labels
        if labels is None:
            labels = tuple(self._weighted(records, index.num_samples))
        write_labels(join(self.directory, LABELS_NAME), labels)
        write_manifest(index)
        remove(join(self.directory, UNFINISHED_NAME))
        remove_directory(join(self.directory, RECORDS_NAME))
        return PackReport(index, tuple(labels), skipped)

    def _all_records(self) -> list[ShardRecord]:
        numbers = range(self.plan.num_shards)
        found = self._records(numbers)
        missing = [self._shard_name(number) for number in numbers if found[number] is None]
        if missing:
            more = ", ..." if len(missing) > NUM_LISTED else ""
            raise PackingError(
                f"{self.directory}: {len(missing)} of {self.plan.num_shards} shards are not packed "
                f"yet ({', '.join(missing[:NUM_LISTED])}{more}); run the parts that are missing, "
                "then this again"
            )
        return [record for record in found if record is not None]

    def _make_plan(self, images: Sequence[ImageFile]) -> PackPlan:
        labelled = [
            LabelledImage(image, tuple(self._ids[name] for name in dict.fromkeys(image.labels)))
            for image in images
        ]
        labels: object = list(self._ids)
        if self._known_labels is not None:
            labels = [asdict(label) for label in self._known_labels]
        return make_plan(
            labelled,
            labels=json.dumps(labels),
            prefix=self._options.prefix,
            shard_bytes=self._options.shard_bytes,
            payloads=self._options.payloads,
        )

    def _job(self, number: int) -> ShardJob:
        options = self._options
        return ShardJob(
            self.plan.shard(number),
            plan=self._fingerprint,
            directory=self.directory,
            prefix=options.prefix,
            payloads=options.payloads,
            skip_bad=options.skip_bad,
        )

    def _shard_name(self, number: int) -> str:
        return shard_name(self._options.prefix, number)

    def _records(self, numbers: Sequence[int]) -> list[ShardRecord | None]:
        """The records of the shards that are final, None for those that are not."""
        if not names_in(join(self.directory, RECORDS_NAME)):
            return [None] * len(numbers)
        sizes = sizes_in(self.directory)
        urls = [record_url(self.directory, self._shard_name(number)) for number in numbers]
        with ThreadPoolExecutor(NUM_READERS) as pool:
            found = pool.map(ShardRecord.read, urls)
            return [
                record if record is not None and self._is_final(record, number, sizes) else None
                for number, record in zip(numbers, found, strict=True)
            ]

    def _is_final(self, record: ShardRecord, number: int, sizes: Mapping[str, int | None]) -> bool:
        """Whether the shard is there, and of this plan and these images."""
        entry = record.shard.entry
        return (
            record.plan == self._fingerprint
            and record.images == self.plan.shard(number).digest()
            and sizes.get(entry.shard, -1) in (None, entry.bytes)
            and entry.index in sizes
        )

    def _weighted(self, records: Sequence[ShardRecord], num_samples: int) -> Iterator[Label]:
        counts: Counter[int] = Counter()
        for record in records:
            counts.update(record.label_counts)
        for name, number in self._ids.items():
            yield Label(number, name, counts[number] / num_samples)
