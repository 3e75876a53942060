"""Files by path or URL, through fsspec: names, whole reads, and writes that appear at once."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any

import fsspec

from datapipe.errors import UnsupportedUrl


def open_filesystem(url: str) -> tuple[Any, str]:
    """The fsspec file system of a URL and the path inside it."""
    try:
        filesystem, path = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise UnsupportedUrl(url, str(error)) from error
    return filesystem, path


def join(directory: str, name: str) -> str:
    """`name` inside `directory`, unless it is absolute itself."""
    if "://" in name or os.path.isabs(name):
        return name
    return f"{directory.rstrip('/')}/{name}"


def absolute(url: str) -> str:
    """The same place, independent of the working directory."""
    return url.rstrip("/") if "://" in url else os.path.abspath(os.path.expanduser(url))


def directory_of(url: str) -> str:
    return url.rpartition("/")[0]


def exists(url: str) -> bool:
    filesystem, path = open_filesystem(url)
    return bool(filesystem.exists(path))


def remove(url: str) -> None:
    filesystem, path = open_filesystem(url)
    filesystem.rm(path)


def read_bytes(url: str) -> bytes:
    filesystem, path = open_filesystem(url)
    return bytes(filesystem.cat_file(path))


def write_bytes(url: str, payload: bytes) -> None:
    with replacing(url) as file:
        file.write(payload)


@contextmanager
def replacing(url: str) -> Iterator[IO[bytes]]:
    """A file to write, under another name until the block ends well; then it takes its place."""
    filesystem, path = open_filesystem(url)
    filesystem.makedirs(directory_of(path), exist_ok=True)
    partial = f"{path}.partial"
    try:
        with filesystem.open(partial, "wb") as file:
            yield file
        filesystem.mv(partial, path)
    except BaseException:
        if filesystem.exists(partial):
            filesystem.rm(partial)
        raise
