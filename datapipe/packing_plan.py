"""PackPlan: which image goes into which shard, known before anything is written.

The same images, labels and options give the same plan for every number of processes and parts, and
each shard's bytes follow from its part of the plan alone. The plan is written down in the mark of
an unfinished directory (`packing-unfinished`), with the shards' first images: who goes on there
takes those, so that an image that was repaired in between does not move every shard behind it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from tarfile import BLOCKSIZE
from typing import Any

from datapipe.errors import PackingError
from datapipe.json_text import parse_json
from datapipe.payloads import PayloadOptions
from datapipe.sources import ImageFile
from datapipe.writer import describe

FORMAT, VERSION = "datapipe-packing", 1

FACT_NAMES = {
    "num_images": "number of images",
    "images": "images, their order (--seed) or their labels",
    "labels": "ids or weights of the labels",
    "prefix": "--prefix",
    "shard_bytes": "size of a shard (--shard-mb) in bytes",
    "payloads": "treatment of JPEGs (--restart-markers, --reencode-...)",
}


@dataclass(frozen=True, slots=True)
class LabelledImage:
    """An image and the ids of its labels."""

    file: ImageFile
    label_ids: tuple[int, ...]

    def member_bytes(self) -> int:
        """What it takes in a tar, if it is packed as it is."""
        description = describe(self.label_ids, self.file.short_name)
        sizes = (self.file.num_bytes(), len(description))
        return sum(BLOCKSIZE + -(-size // BLOCKSIZE) * BLOCKSIZE for size in sizes)


@dataclass(frozen=True)
class PlannedShard:
    """One shard of the plan."""

    number: int
    first_image: int
    """Its place among all images; samples are numbered by it."""
    images: Sequence[LabelledImage]

    def digest(self) -> str:
        """Differs where an image has another name, size or labels than before."""
        return _digest(
            (image.file.name, image.file.num_bytes(), image.label_ids) for image in self.images
        )


@dataclass(frozen=True)
class PackPlan:
    """The shards to be written, and the facts that they follow from."""

    images: Sequence[LabelledImage]
    first_images: tuple[int, ...]
    facts: Mapping[str, str | int]

    @property
    def num_shards(self) -> int:
        return len(self.first_images)

    def shard(self, number: int) -> PlannedShard:
        start, following = self.first_images[number], number + 1
        is_last = following == self.num_shards
        stop = len(self.images) if is_last else self.first_images[following]
        return PlannedShard(number, start, self.images[start:stop])

    def fingerprint(self) -> str:
        return hashlib.sha256(self.to_bytes()).hexdigest()

    def to_bytes(self) -> bytes:
        header = {"format": FORMAT, "version": VERSION}
        return json.dumps(
            {**header, **self.facts, "first_images": list(self.first_images)}
        ).encode()


def make_plan(
    images: Sequence[LabelledImage],
    *,
    labels: str,
    prefix: str,
    shard_bytes: int,
    payloads: PayloadOptions,
) -> PackPlan:
    """A shard ends where its images, as they are in the source, take `shard_bytes` in a tar.

    labels: text that tells their ids and weights.
    """
    facts: dict[str, str | int] = {
        "num_images": len(images),
        "images": _digest((image.file.name, image.label_ids) for image in images),
        "labels": _digest([labels]),
        "prefix": prefix,
        "shard_bytes": shard_bytes,
        "payloads": str(payloads),
    }
    return PackPlan(images, _cuts(images, shard_bytes), facts)


def continued(plan: PackPlan, written: bytes, *, where: str) -> PackPlan:
    """The plan with the cuts of the one that was written down in the directory `where`.

    Raises `PackingError` if that is none, or follows from other facts.
    """
    mark = _parsed(written)
    if mark is None:
        raise PackingError(
            f"{where} holds a data set that something else began to write; choose another "
            "directory, or remove this one"
        )
    differences = [
        f"{FACT_NAMES[name]} {_change(mark.get(name), value)}"
        for name, value in plan.facts.items()
        if mark.get(name) != value
    ]
    if differences:
        raise PackingError(
            f"{where} holds an unfinished packing of another command: {'; '.join(differences)}; "
            "give the command that began it, choose another directory, or remove this one"
        )
    return PackPlan(plan.images, tuple(mark["first_images"]), plan.facts)


def _cuts(images: Sequence[LabelledImage], shard_bytes: int) -> tuple[int, ...]:
    """The first image of each shard."""
    cuts, num_bytes = [], shard_bytes
    for number, image in enumerate(images):
        if num_bytes >= shard_bytes:
            cuts.append(number)
            num_bytes = 0
        num_bytes += image.member_bytes()
    return tuple(cuts)


def _parsed(written: bytes) -> dict[str, Any] | None:
    try:
        mark = parse_json(written)
    except ValueError:
        return None
    if not isinstance(mark, dict) or not isinstance(mark.get("first_images"), list):
        return None
    return mark if (mark.get("format"), mark.get("version")) == (FORMAT, VERSION) else None


def _change(old: object, new: object) -> str:
    """What was and what is; of a digest only that it differs."""
    is_digest = isinstance(new, str) and len(new) == hashlib.sha256().digest_size * 2
    return "differ" if is_digest else f"was {old!r}, is {new!r}"


def _digest(items: Iterable[object]) -> str:
    digest = hashlib.sha256()
    for item in items:
        digest.update(json.dumps(item).encode() + b"\n")
    return digest.hexdigest()
