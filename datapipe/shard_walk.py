"""The samples of an existing WebDataset shard.

A sample is the members that share a name up to the first dot, wherever they lie in the tar: an
image (.jpg, .jpeg, .png, .webp) and its labels: .cls (one number) or .json ({"labels": [..]},
{"label": i} or {"cls": i}, beside them perhaps the "name" of the file that was packed). Other
members are ignored.
"""

from __future__ import annotations

import os
import re
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from datapipe import native_walk
from datapipe.errors import BadIndex, MissingShard, UnreadableShard
from datapipe.json_text import parse_json
from datapipe.native_walk import OddArchive, Piece
from datapipe.storage import local_path, opened
from datapipe.table import LARGEST_LABEL, SampleEntry
from datapipe.tar_walk import (
    LARGEST_IMAGE_MEMBER,
    LARGEST_LABEL_MEMBER,
    fast_pieces,
    open_tar,
    tar_pieces,
)

USUAL_LABELS = re.compile(
    rb'(0|[1-9]\d{0,6})|\{"labels": \[((?:0|[1-9]\d{0,6})(?:, (?:0|[1-9]\d{0,6}))*)\]'
    rb'(?:, "name": "([ !#-\[\]-~]*)")?\}'
)
"""A class number alone, or what `datapipe.writer` writes: parsed at half of json's cost, and to the
same.
"""


@dataclass(frozen=True)
class ShardContents:
    """What a shard holds, and what somebody should know of it."""

    entries: list[SampleEntry]
    warnings: tuple[str, ...]


def walk_shard(url: str, *, with_crc32: bool) -> ShardContents:
    """The samples with an image, in the order in which their first member lies in the shard.

    with_crc32: read all of the images; else those of a local shard are not read but for their first
    bytes. A shard that ends early gives what it holds, with a warning; so does one with samples
    that have no usable label, or that are too large. Errors: `MissingShard`, `BadIndex` (two
    samples of one name), `UnreadableUrl`, `UnreadableShard` (not a tar).
    """
    try:
        path = local_path(url)
        if path is not None and native_walk.is_available():
            try:
                found = _Samples(url)
                found.add(fast_pieces(path, with_crc32=with_crc32))
                return found.contents()
            except OddArchive:
                pass
        return walk_with_tarfile(url, with_crc32=with_crc32 or path is None)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise MissingShard((url,)) from error


def walk_with_tarfile(url: str, *, with_crc32: bool) -> ShardContents:
    """What `walk_shard` finds, by the slow way that any tar can go."""
    found = _Samples(url)
    try:
        with opened(url) as file:
            file_size = file.seek(0, os.SEEK_END)
            file.seek(0)
            with open_tar(file) as tar:
                try:
                    found.add(tar_pieces(tar, file_size, with_crc32=with_crc32))
                except tarfile.ReadError as error:
                    found.warn("shard ends early", samples=len(found.samples), reason=error)
    except tarfile.TarError as error:
        raise UnreadableShard(url, str(error)) from error
    return found.contents()


@dataclass
class _Samples:
    """The samples of one shard, by key, in the order of their first members."""

    url: str
    samples: dict[str, SampleEntry] = field(default_factory=dict)
    """With offset -1 as long as no image was met."""
    warnings: list[str] = field(default_factory=list)
    too_large: list[str] = field(default_factory=list)
    """Keys and extensions of members."""

    def add(self, pieces: Iterable[Piece]) -> None:
        samples = self.samples
        for key, offset, size, width, height, crc32, extension, content in pieces:
            labels = name = None
            if content is not None:
                labels, name = labels_and_name(extension, content)
            elif extension:
                self.too_large.append(f"{key}.{extension}")
                continue
            sample = SampleEntry(key, offset, size, width, height, labels, crc32, name)
            known = samples.get(key)
            samples[key] = sample if known is None else self._joined(known, sample)

    def _joined(self, known: SampleEntry, sample: SampleEntry) -> SampleEntry:
        """Of two label members the later one counts, if it holds labels."""
        if known.offset >= 0 and sample.offset >= 0:
            raise BadIndex(self.url, f"two images have the name {known.key!r}; repack the shard")
        return (sample if sample.offset >= 0 else known)._replace(
            labels=known.labels if sample.labels is None else sample.labels,
            name=known.name if sample.name is None else sample.name,
        )

    def warn(self, event: str, **facts: object) -> None:
        listed = " ".join(f"{name}={value}" for name, value in facts.items())
        self.warnings.append(f"{event} shard={self.url} {listed}")

    def contents(self) -> ShardContents:
        entries = [sample for sample in self.samples.values() if sample.offset >= 0]
        unlabelled = [entry.key for entry in entries if entry.labels is None]
        if self.too_large:
            self.warn(
                "members are too large and were left out",
                members=len(self.too_large),
                first=repr(self.too_large[0]),
                allowed_image_bytes=LARGEST_IMAGE_MEMBER,
                allowed_label_bytes=LARGEST_LABEL_MEMBER,
            )
        if unlabelled:
            self.warn(
                "samples have no usable label",
                samples=len(unlabelled),
                first=repr(unlabelled[0]),
                allowed=f"ids from 0 to {LARGEST_LABEL:,}",
            )
        if not entries:
            self.warn("shard holds no image", members=len(self.samples))
        return ShardContents(entries, tuple(self.warnings))


def labels_and_name(extension: str, content: bytes) -> tuple[tuple[int, ...] | None, str | None]:
    """The label ids of a label member, None where there are none of use, and the name it tells."""
    usual = USUAL_LABELS.fullmatch(content)
    if usual is None or (usual[1] is None and extension == "cls"):
        value = _parsed(content)
        name = value.get("name") if isinstance(value, dict) else None
        return _labels(extension, value), _encodable(name) if isinstance(name, str) else None
    number, numbers, name_bytes = usual.groups()
    ids = (number,) if numbers is None else numbers.split(b", ")
    return tuple(dict.fromkeys(map(int, ids))), None if name_bytes is None else name_bytes.decode()


def _encodable(name: str) -> str:
    return name.encode("utf-8", "backslashreplace").decode()


def _parsed(content: bytes) -> Any:
    """The JSON in a member, None where there is none."""
    try:
        return parse_json(content)
    except ValueError:
        return None


def _labels(extension: str, value: Any) -> tuple[int, ...] | None:
    """The label ids in a member's JSON, None where it does not hold any that can be used."""
    if isinstance(value, dict) and extension == "json":
        value = value.get("labels", value.get("label", value.get("cls")))
    labels = value if isinstance(value, list) else [value]
    for label in labels:
        if type(label) is not int or not 0 <= label <= LARGEST_LABEL:
            return None
    return tuple(dict.fromkeys(labels))
