"""Writing shards: images and labels -> WebDataset tars, their Parquet tables, and the manifest.

Members are `000123.jpg` and `000123.json` ({"labels": [ids], "name": of the file that was packed,
where there is one}), numbered through all shards. Every file appears whole or not at all, a shard's
table right after the shard. A mark says that the directory is no data set yet: it comes first and
goes last, after `index.json`. The same samples give the same bytes.

Tars are written with `tarfile`: `webdataset.TarWriter` does not say where a member's bytes lie, and
importing it takes torch into every process that packs.
"""

from __future__ import annotations

import io
import json
import re
import tarfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import IO

from datapipe.decode import DecodeError, image_size
from datapipe.errors import PackingError
from datapipe.index import MANIFEST_NAME, UNFINISHED_NAME, ShardIndex, write_manifest
from datapipe.labels import LABELS_NAME, Label, write_labels
from datapipe.manifest import ShardEntry
from datapipe.storage import (
    absolute,
    directory_of,
    join,
    names_in,
    read_bytes,
    remove,
    replacing,
    size_of,
    write_bytes,
)
from datapipe.table import LARGEST_LABEL, SampleEntry, TableFacts, crc32_of, write_table
from datapipe.tar_walk import LARGEST_IMAGE_MEMBER, LARGEST_LABEL_MEMBER

PARTIAL_NAMES = tuple(f"{name}.partial" for name in (MANIFEST_NAME, LABELS_NAME, UNFINISHED_NAME))
"""What a write that was cut off may leave, besides shards and tables."""


@dataclass(frozen=True)
class RawImage:
    """An encoded image and what is on it."""

    payload: bytes
    extension: str
    """jpg, png or webp."""
    label_ids: tuple[int, ...]
    name: str | None = None
    """Of the file that is packed, with its folder."""

    def description(self) -> bytes:
        """The JSON member."""
        return describe(self.label_ids, self.name)


@dataclass(frozen=True)
class WrittenShard:
    """A shard that is there, with its table."""

    entry: ShardEntry
    num_labels: int
    """The largest usable label id + 1."""


class ShardFile:
    """A shard that is being written, and the rows of its table."""

    def __init__(self, file: IO[bytes]) -> None:
        self._tar = tarfile.TarFile(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT)
        self.entries: list[SampleEntry] = []

    @property
    def num_bytes(self) -> int:
        """So far, without the zeros that end a tar."""
        return self._tar.offset

    def add(self, number: int, image: RawImage) -> None:
        """Append a sample. `PackingError` for one that readers would pass over as too large."""
        key, description = f"{number:06d}", image.description()
        what = image.name or key
        _check_size(what, "the image", len(image.payload), LARGEST_IMAGE_MEMBER)
        _check_size(what, "its list of labels", len(description), LARGEST_LABEL_MEMBER)
        offset = self._append(f"{key}.{image.extension}", image.payload)
        self._append(f"{key}.json", description)
        self.entries.append(_entry(key, offset, image))

    def close(self) -> None:
        self._tar.close()

    def _append(self, name: str, payload: bytes) -> int:
        """Where the member's bytes begin."""
        member = tarfile.TarInfo(name)
        member.size, member.mode = len(payload), 0o444
        start = self._tar.offset + tarfile.BLOCKSIZE
        self._tar.addfile(member, io.BytesIO(payload))
        self._tar.members.clear()  # type: ignore[attr-defined]  # or every header stays in memory
        return start


def write_shards(
    samples: Iterable[RawImage],
    *,
    directory: str,
    labels: Iterable[Label] | None,
    prefix: str,
    samples_per_shard: int | None,
    shard_bytes: int | None,
) -> ShardIndex:
    """Write `<prefix>-00000.tar`, ... and their index; a shard ends at either limit (None: no
    limit). What an interrupted call left in the directory is deleted.

    labels: written to labels.json, taken after the last sample; None for no such file. Errors:
    `PackingError` when the directory holds a data set or other tars, there are no samples, or one
    is too large; `OSError`.
    """
    directory = absolute(directory)
    leftovers = _leftovers(directory)
    shards: list[WrittenShard] = []
    numbered = iter(enumerate(samples))
    upcoming = next(numbered, None)
    if upcoming is None:
        raise PackingError(f"{directory}: no images to pack")
    for name in leftovers:
        remove(join(directory, name))
    mark = join(directory, UNFINISHED_NAME)
    write_bytes(mark, prefix.encode())

    def is_full(shard: ShardFile) -> bool:
        return len(shard.entries) == samples_per_shard or (
            shard_bytes is not None and shard.num_bytes >= shard_bytes
        )

    while upcoming is not None:
        url = join(directory, shard_name(prefix, len(shards)))
        shards.append(write_shard(url, chain([upcoming], numbered), is_full=is_full))
        upcoming = next(numbered, None)
    if labels is not None:
        write_labels(join(directory, LABELS_NAME), labels)
    index = index_of(directory, shards)
    write_manifest(index)
    remove(mark)
    return index


def write_shard(
    url: str,
    samples: Iterator[tuple[int, RawImage]],
    *,
    is_full: Callable[[ShardFile], bool] = lambda _: False,
) -> WrittenShard:
    """Write numbered samples into a shard until it is full, then its table beside it.

    Errors: those of `ShardFile.add`; `OSError`.
    """
    with replacing(url) as file:
        shard = ShardFile(file)
        for number, image in samples:
            shard.add(number, image)
            if is_full(shard):
                break
        shard.close()
    name = url.rpartition("/")[2]
    table = f"{name.removesuffix('.tar')}.parquet"
    facts = TableFacts.of(shard.entries, shard=name, shard_bytes=size_of(url))
    write_table(join(directory_of(url), table), shard.entries, facts=facts)
    entry = ShardEntry(name, table, facts.num_samples, facts.shard_bytes, facts.digest)
    return WrittenShard(entry, facts.num_labels)


def index_of(directory: str, shards: Iterable[WrittenShard]) -> ShardIndex:
    """The index of shards in this directory."""
    shards = list(shards)
    num_labels = max(shard.num_labels for shard in shards)
    return ShardIndex(directory, [shard.entry for shard in shards], num_labels=num_labels)


def shard_name(prefix: str, number: int) -> str:
    return f"{prefix}-{number:05d}.tar"


def describe(label_ids: tuple[int, ...], name: str | None) -> bytes:
    """The JSON member of a sample."""
    named = {} if name is None else {"name": name}
    return json.dumps({"labels": list(label_ids), **named}).encode()


def _check_size(name: str, what: str, num_bytes: int, limit: int) -> None:
    if num_bytes > limit:
        raise PackingError(f"{name}: {what} takes {num_bytes:,} bytes; allowed: {limit:,}")


def _entry(key: str, offset: int, image: RawImage) -> SampleEntry:
    """The row that walking the shard gives."""
    try:
        width, height = image_size(image.payload)
    except DecodeError:
        width, height = 0, 0
    is_usable = all(0 <= label <= LARGEST_LABEL for label in image.label_ids)
    return SampleEntry(
        key=key,
        offset=offset,
        size=len(image.payload),
        width=width,
        height=height,
        labels=tuple(dict.fromkeys(image.label_ids)) if is_usable else None,
        crc32=crc32_of(image.payload),
        name=image.name and image.name.encode("utf-8", "backslashreplace").decode(),
    )


def _leftovers(directory: str) -> list[str]:
    """What an interrupted call left, by its mark, which holds the prefix of its shards.

    Raises `PackingError` if the directory holds a data set, or tars that are none of these.
    """
    names = names_in(directory)
    if MANIFEST_NAME in names:
        manifest_url = join(directory, MANIFEST_NAME)
        raise PackingError(f"{manifest_url} exists; choose another directory, or remove this one")
    leftovers: list[str] = []
    if UNFINISHED_NAME in names:
        prefix = read_bytes(join(directory, UNFINISHED_NAME)).decode(errors="replace")
        shard_file = re.compile(re.escape(prefix) + r"-\d{5,}\.(tar|parquet)(\.partial)?")
        leftovers = sorted(
            name for name in names if shard_file.fullmatch(name) or name in PARTIAL_NAMES
        )
    foreign = sorted(name for name in names.difference(leftovers) if name.endswith(".tar"))
    if foreign:
        raise PackingError(f"{directory} holds {foreign[0]}; choose an empty directory")
    return leftovers
