"""Writing shards: images and labels -> WebDataset tars, their Parquet index, and the manifest.

Members are `000123.jpg` and `000123.json` ({"labels": [ids]}), numbered through all shards. Every
file appears whole or not at all; `index.json` comes last, so a directory without it is not a data
set. The same samples give the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import webdataset

from datapipe.errors import PackingError
from datapipe.index import MANIFEST_NAME, UNFINISHED_NAME, ShardIndex, index_shards
from datapipe.labels import LABELS_NAME, Label, write_labels
from datapipe.storage import absolute, join, open_filesystem, remove, replacing, write_bytes


@dataclass(frozen=True)
class RawImage:
    """An encoded image and what is on it."""

    payload: bytes
    extension: str
    """jpg, png or webp."""
    label_ids: tuple[int, ...]


def write_shards(
    samples: Iterable[RawImage],
    *,
    directory: str,
    labels: Sequence[Label] | None,
    prefix: str,
    samples_per_shard: int | None,
    shard_bytes: int | None,
) -> ShardIndex:
    """Write `<prefix>-00000.tar`, ... and their index; a shard ends at either limit (None: no
    limit). Until the index is there, a mark says that the directory is no data set yet.

    labels: written to labels.json; None where the caller does so. Errors: `PackingError` when the
    directory holds a data set already, or there are no samples; `OSError`.
    """
    directory = absolute(directory)
    check_unused(directory)
    urls: list[str] = []
    numbered = enumerate(samples)
    upcoming = next(numbered, None)
    if upcoming is None:
        raise PackingError(f"{directory}: no images to pack")
    mark = join(directory, UNFINISHED_NAME)
    write_bytes(mark, b"")
    while upcoming is not None:
        url = join(directory, f"{prefix}-{len(urls):05d}.tar")
        upcoming = _write_shard(
            url, upcoming, numbered, samples_per_shard=samples_per_shard, shard_bytes=shard_bytes
        )
        urls.append(url)
    if labels is not None:
        write_labels(join(directory, LABELS_NAME), labels)
    index = index_shards(urls, directory_url=directory)
    remove(mark)
    return index


def check_unused(directory: str) -> None:
    """Raise `PackingError` if there is a data set in this directory."""
    manifest_url = join(absolute(directory), MANIFEST_NAME)
    filesystem, path = open_filesystem(manifest_url)
    if filesystem.exists(path):
        raise PackingError(f"{manifest_url} exists; choose another directory, or remove this one")


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
            labels = json.dumps({"labels": list(image.label_ids)}).encode()
            sample = {"__key__": f"{number:06d}", image.extension: image.payload, "json": labels}
            num_samples += 1
            tar.write(sample)
            upcoming = next(following, None)
            if num_samples == samples_per_shard:
                break
            if shard_bytes is not None and file.tell() >= shard_bytes:
                break
    return upcoming
