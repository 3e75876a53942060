"""Images wherever they lie: files, folders and shards, by path or URL."""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path, PurePosixPath

from datapipe.errors import DataError, NoImages
from datapipe.listing import sizes_listed
from datapipe.sources import ImageFile, is_image, list_files
from datapipe.storage import (
    WEB_URLS,
    absolute,
    copy_file,
    exists,
    local_path,
    names_below,
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
    """The images at a path or URL, sorted by name: of one image, a tar, or a folder of these with
    all that is below it, which web servers do not tell. Errors, at once: `NoImages`,
    `PackingError`, `UnreadableUrl`.
    """
    url = absolute(place)
    path = local_path(url)
    found = _local(path) if path is not None else _remote(url)
    first = next(found, None)
    if first is None:
        raise NoImages(place, f"holds no images; expected: {EXPECTED}, or shards")
    return chain([first], found)


def _local(path: Path) -> Iterator[LooseImage]:
    if not path.exists():
        raise NoImages(str(path), "there is no such file or folder")
    if path.is_dir():
        for below in sorted(path.rglob("*")):
            if below.is_file() and (is_image(below) or below.suffix == ".tar"):
                yield from _below(_local(below), str(below))
    elif path.suffix == ".tar":
        yield from _in_tar(path, str(path))
    else:
        name = os.fsencode(path).decode("utf-8", "backslashreplace")
        yield LooseImage(name, path.read_bytes)


def _below(images: Iterator[LooseImage], name: str) -> Iterator[LooseImage]:
    """What a folder has in one place; a tar that cannot be read costs no other place."""
    try:
        yield from images
    except DataError as error:
        yield LooseImage(name, partial(_raise, error))


def _raise(error: DataError) -> bytes:
    raise error


def _in_tar(path: Path, name: str, owner: object = None) -> Iterator[LooseImage]:
    """owner: what keeps the file there as long as one of its images may be read."""
    for image in list_files(path, lambda _: (), expected=EXPECTED).images:
        yield LooseImage(f"{name}/{image.name}", partial(_read, image, owner))


def _read(image: ImageFile, _owner: object) -> bytes:
    return image.read()


class _Copy:
    """Of a remote file, on this machine, as long as somebody knows of it."""

    def __init__(self, url: str) -> None:
        directory = tempfile.mkdtemp(prefix="xdist-images-")
        weakref.finalize(self, shutil.rmtree, directory, ignore_errors=True)
        self.path = Path(directory, PurePosixPath(url).name)
        copy_file(url, self.path)


def _remote(url: str) -> Iterator[LooseImage]:
    kind = PurePosixPath(url)
    if kind.suffix == ".tar":
        copy = _Copy(url)
        yield from _in_tar(copy.path, url, copy)
    elif is_image(kind):
        if not exists(url):
            raise NoImages(url, "there is no such file")
        yield LooseImage(url, partial(read_bytes, url))
    elif names := sizes_listed(url) if url.startswith(WEB_URLS) else names_below(url):
        for name in sorted(names):
            if is_image(PurePosixPath(name)) or name.endswith(".tar"):
                below = f"{url}/{name}"  # Not joined: a name in a bucket may look absolute.
                yield from _below(_remote(below), below)
    elif exists(url):
        yield LooseImage(url, partial(read_bytes, url))
