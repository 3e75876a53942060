"""Images wherever they lie: files, folders and shards, by path or URL."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath

from datapipe.errors import NoImages
from datapipe.sources import is_image, list_files
from datapipe.storage import (
    absolute,
    exists,
    join,
    local_path,
    names_in,
    open_filesystem,
    read_bytes,
)

EXPECTED = "<image>.jpg (or .jpeg, .png, .webp)"


@dataclass(frozen=True)
class LooseImage:
    """An image that is still to be read."""

    name: str
    """Its path or URL; of one in a shard, that of the shard and its own name."""
    read: Callable[[], bytes]
    """Raises `OSError` and `UnreadableUrl`."""


def loose_images(place: str) -> Iterator[LooseImage]:
    """The images at a path or URL, sorted by name: of one image, a folder with all that is below
    it, a tar, or a folder of these. Errors: `NoImages`, `PackingError`, `UnreadableUrl`.
    """
    url = absolute(place)
    path = local_path(url)
    found = _local(path) if path is not None else _remote(url)
    first = next(found, None)
    if first is None:
        raise NoImages(place, f"holds no images; expected: {EXPECTED}, or shards")
    yield first
    yield from found


def _local(path: Path) -> Iterator[LooseImage]:
    if not path.exists():
        raise NoImages(str(path), "there is no such file or folder")
    if path.is_dir():
        for below in sorted(path.rglob("*")):
            if below.is_file() and (is_image(below) or below.suffix == ".tar"):
                yield from _local(below)
    elif path.suffix == ".tar":
        yield from _in_tar(path, str(path))
    else:
        yield LooseImage(str(path), path.read_bytes)


def _in_tar(path: Path, name: str) -> Iterator[LooseImage]:
    for image in list_files(path, lambda _: (), expected=EXPECTED).images:
        yield LooseImage(f"{name}/{image.name}", image.read)


def _remote(url: str) -> Iterator[LooseImage]:
    kind = PurePosixPath(url)
    if kind.suffix == ".tar":
        filesystem, path = open_filesystem(url)
        with tempfile.TemporaryDirectory() as directory:
            copy = Path(directory, kind.name)
            filesystem.get_file(path, str(copy))
            yield from _in_tar(copy, url)
    elif is_image(kind):
        if not exists(url):
            raise NoImages(url, "there is no such file")
        yield LooseImage(url, partial(read_bytes, url))
    else:
        for name in sorted(names_in(url)):
            if is_image(PurePosixPath(name)) or name.endswith(".tar"):
                yield from _remote(join(url, name))
