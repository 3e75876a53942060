"""Packing one shard of a plan: a piece of work that any process can do, twice as well as once.

It writes the tar, the table beside it, and last a small record below `packing-records/`, from which
the manifest is put together in the end. A shard is final once its record is there.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass

from datapipe.decode import DecodeError
from datapipe.errors import PackingError
from datapipe.json_text import parse_json
from datapipe.manifest import ShardEntry
from datapipe.packing_plan import PlannedShard
from datapipe.payloads import PayloadOptions
from datapipe.sources import ImageFile
from datapipe.storage import join, read_bytes, write_bytes
from datapipe.writer import RawImage, WrittenShard, shard_name, write_shard

RECORDS_NAME = "packing-records"


@dataclass(frozen=True)
class ShardRecord:
    """What is known of a shard once it is packed."""

    number: int
    plan: str
    """Fingerprint of the plan that it is a part of."""
    images: str
    """Digest of the images that it was made of."""
    shard: WrittenShard
    label_counts: Mapping[int, int]
    skipped: tuple[str, ...]
    """Each image that was left out, and why."""

    def to_bytes(self) -> bytes:
        return json.dumps(asdict(self)).encode()

    @staticmethod
    def read(url: str) -> ShardRecord | None:
        """None where there is none, or none that this version wrote."""
        try:
            fields = parse_json(read_bytes(url))
            shard = fields["shard"]
            return ShardRecord(
                number=fields["number"],
                plan=fields["plan"],
                images=fields["images"],
                shard=WrittenShard(ShardEntry(**shard["entry"]), shard["num_labels"]),
                label_counts={int(label): count for label, count in fields["label_counts"].items()},
                skipped=tuple(fields["skipped"]),
            )
        except (FileNotFoundError, NotADirectoryError, ValueError, TypeError, KeyError):
            return None


@dataclass(frozen=True)
class ShardJob:
    """A shard that is to be packed, with all that it takes. Picklable."""

    planned: PlannedShard
    plan: str
    """Fingerprint of the whole plan."""
    directory: str
    """Absolute URL."""
    prefix: str
    payloads: PayloadOptions
    skip_bad: bool

    @property
    def shard_name(self) -> str:
        return shard_name(self.prefix, self.planned.number)

    @property
    def record_url(self) -> str:
        return record_url(self.directory, self.shard_name)


def record_url(directory: str, shard: str) -> str:
    return join(directory, f"{RECORDS_NAME}/{shard.removesuffix('.tar')}.json")


def pack_shard(job: ShardJob, on_images: Callable[[int], None] = lambda _: None) -> ShardRecord:
    """Write the job's shard, table and record; `on_images` is called with 1 after each image.

    Errors: `PackingError` for a bad image unless the job skips them, and for a treatment of images
    that this machine is not equipped for; `OSError`.
    """
    job.payloads.check_available()
    counts: Counter[int] = Counter()
    skipped: list[str] = []

    def samples() -> Iterator[tuple[int, RawImage]]:
        for number, image in enumerate(job.planned.images, start=job.planned.first_image):
            payload = _payload(image.file, job, skipped)
            if payload is not None:
                counts.update(image.label_ids)
                extension = job.payloads.extension(image.file.extension)
                yield number, RawImage(payload, extension, image.label_ids, image.file.short_name)
            on_images(1)

    shard = write_shard(join(job.directory, job.shard_name), samples())
    record = ShardRecord(
        number=job.planned.number,
        plan=job.plan,
        images=job.planned.digest(),
        shard=shard,
        label_counts=dict(sorted(counts.items())),
        skipped=tuple(skipped),
    )
    write_bytes(job.record_url, record.to_bytes())
    return record


def _payload(image: ImageFile, job: ShardJob, skipped: list[str]) -> bytes | None:
    """The bytes to be packed; None, and a line in `skipped`, if the image does not decode."""
    try:
        return job.payloads.apply(image.read())
    except (OSError, DecodeError) as error:
        reason = f"{image.name}: {error}"
        if not job.skip_bad:
            raise PackingError(
                f"{reason}; repair it, or leave bad images out with --skip-bad"
            ) from error
        skipped.append(reason)
        return None
