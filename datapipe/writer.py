"""Writing shards: images and labels -> WebDataset tars, their Parquet index, and the manifest.

Members are `000123.jpg` and `000123.json` ({"labels": [ids], "name": of the file that was packed,
where there is one}), numbered through all shards. Every file appears whole or not at all. A mark
says that the directory is no data set yet: it comes first and goes last, after `index.json`. The
same samples give the same bytes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import webdataset

from datapipe.errors import PackingError
from datapipe.index import MANIFEST_NAME, UNFINISHED_NAME, ShardIndex, index_shards
from datapipe.labels import LABELS_NAME, Label, write_labels
from datapipe.storage import (
    absolute,
    join,
    names_in,
    read_bytes,
    remove,
    replacing,
    write_bytes,
)

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
        named = {} if self.name is None else {"name": self.name}
        return json.dumps({"labels": list(self.label_ids), **named}).encode()


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
    `PackingError` when the directory holds a data set or other tars, or there are no samples; those
    of `index_shards`; `OSError`.
    """
    directory = absolute(directory)
    leftovers = _leftovers(directory)
    urls: list[str] = []
    numbered = enumerate(samples)
    upcoming = next(numbered, None)
    if upcoming is None:
        raise PackingError(f"{directory}: no images to pack")
    for name in leftovers:
        remove(join(directory, name))
    mark = join(directory, UNFINISHED_NAME)
    write_bytes(mark, prefix.encode())
    while upcoming is not None:
        url = join(directory, f"{prefix}-{len(urls):05d}.tar")
        upcoming = _write_shard(
            url, upcoming, numbered, samples_per_shard=samples_per_shard, shard_bytes=shard_bytes
        )
        urls.append(url)
    if labels is not None:
        write_labels(join(directory, LABELS_NAME), labels)
    index = index_shards(urls, directory_url=directory, with_crc32=True)
    remove(mark)
    return index


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


def _write_shard(
    url: str,
    first: tuple[int, RawImage],
    following: Iterator[tuple[int, RawImage]],
    *,
    samples_per_shard: int | None,
    shard_bytes: int | None,
) -> tuple[int, RawImage] | None:
    """Write one shard and return the sample that no longer fits, if there is one."""
    upcoming: tuple[int, RawImage] | None = first
    num_samples = 0
    with replacing(url) as file, webdataset.TarWriter(file, encoder=False, mtime=0) as tar:
        while upcoming is not None:
            number, image = upcoming
            sample = {"__key__": f"{number:06d}", image.extension: image.payload}
            tar.write({**sample, "json": image.description()})
            num_samples += 1
            upcoming = next(following, None)
            if num_samples == samples_per_shard:
                break
            if shard_bytes is not None and file.tell() >= shard_bytes:
                break
    return upcoming
