"""Files by path or URL, through fsspec: names, reads, and writes that appear at once.

Every backend has exceptions of its own. Here they become `UnsupportedUrl`; from a read,
`FileNotFoundError` or `NotADirectoryError` where there is no such file, else `UnreadableUrl`; from
a write, `OSError`.
"""

from __future__ import annotations

import io
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeVar

import fsspec
from fsspec.asyn import AsyncFileSystem, sync
from fsspec.implementations.local import LocalFileSystem

from datapipe.errors import DataError, UnreadableUrl, UnsupportedUrl
from datapipe.retries import is_passing, status_of

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

Result = TypeVar("Result")

S3_PROTOCOLS = ("s3", "s3a")
WEB_URLS = ("http://", "https://")
LOCAL_URLS = ("file://", "local://")
"""Become paths: what is local is read where it lies, never by way of a cache."""
WHOLE_FILE = "the server sends whole files instead of ranges"


def open_filesystem(url: str, **options: Any) -> tuple[Any, str]:
    """The fsspec file system of a URL, with these options of its own, and the path inside it."""
    refuse_pipe(url)
    with _reading(url):
        try:
            filesystem, path = fsspec.core.url_to_fs(url, **options)
        except (ImportError, ValueError) as error:
            raise UnsupportedUrl(url, str(error)) from error
    return filesystem, path


def refuse_pipe(url: str) -> None:
    """Raise `UnsupportedUrl` for what webdataset would hand to a shell."""
    if url.startswith("pipe:"):
        raise UnsupportedUrl(url, "pipe: URLs run a shell command and are refused; name the file")


def join(directory: str, name: str) -> str:
    """`name` inside `directory`, unless it is absolute itself."""
    refuse_pipe(name)
    if "://" in name or os.path.isabs(name):
        return name
    return f"{directory.rstrip('/')}/{name}"


def absolute(url: str) -> str:
    """The same place, independent of the working directory."""
    refuse_pipe(url)
    if url.startswith(LOCAL_URLS):
        return open_filesystem(url)[1]
    return url.rstrip("/") if "://" in url else os.path.abspath(os.path.expanduser(url))


def directory_of(url: str) -> str:
    return url.rpartition("/")[0]


def local_path(url: str) -> Path | None:
    """The path of a URL on this machine's file systems, None for any other."""
    filesystem, path = open_filesystem(url)
    return Path(path) if isinstance(filesystem, LocalFileSystem) else None


def exists(url: str) -> bool:
    """Whether there is this file. `UnreadableUrl` where storage does not say so."""
    try:
        read_range(url, 0, 1)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def names_in(directory: str) -> set[str]:
    """The names in a directory; none where there is no directory."""
    return set(sizes_in(directory))


def sizes_in(directory: str) -> dict[str, int | None]:
    """The files in a directory with their sizes, None where the listing does not tell them.

    As they are now: a listing that a backend has kept does not know what other processes wrote.
    """
    filesystem, path = open_filesystem(directory)
    try:
        with _reading(directory):
            filesystem.invalidate_cache(path)
            listed = filesystem.ls(path, detail=True)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    return {entry["name"].rstrip("/").rpartition("/")[2]: entry.get("size") for entry in listed}


def names_below(directory: str) -> list[str]:
    """The files in a directory and in those below it, by their paths from there; none where there
    is no directory.
    """
    filesystem, path = open_filesystem(directory)
    try:
        with _reading(directory):
            filesystem.invalidate_cache(path)
            found = filesystem.find(path)
    except (FileNotFoundError, NotADirectoryError):
        return []
    return [name for each in found if (name := each[len(path.rstrip("/")) + 1 :])]


def is_private(url: str) -> bool:
    """Whether other processes do not see what is there."""
    return url.startswith("memory://")


def modified(url: str) -> datetime | None:
    """When a file was last written; None where storage does not tell."""
    filesystem, path = open_filesystem(url)
    try:
        with _reading(url):
            time: datetime = filesystem.modified(path)
    except (FileNotFoundError, NotADirectoryError, UnreadableUrl):
        return None
    return time


def size_of(url: str, *, timeout_s: float | None = None) -> int:
    filesystem, path = open_filesystem(url)
    with _reading(url):
        if isinstance(filesystem, AsyncFileSystem):
            size = _awaited(filesystem, filesystem._size, path, timeout_s=timeout_s)
        else:
            size = within(timeout_s, lambda: filesystem.size(path))
    if size is None:
        raise UnreadableUrl(url, "the server does not tell its size")
    return int(size)


def read_bytes(url: str) -> bytes:
    filesystem, path = open_filesystem(url)
    with _reading(url):
        return bytes(filesystem.cat_file(path))


def read_range(url: str, start: int, stop: int, *, timeout_s: float | None = None) -> bytes:
    """The bytes [start, stop) of a file; fewer where it ends early, or the answer was cut short.

    timeout_s: after which a remote read is given up. With it, a read is one attempt: the caller has
    retries of its own. Files of this machine have the kernel's limits.
    """
    if "://" not in url:
        with _reading(url):
            return _read_local(os.path.expanduser(url), start, stop)
    filesystem, path = open_filesystem(url) if timeout_s is None else _open_for_one_attempt(url)
    try:
        with _reading(url):
            content = _fetch_range(filesystem, path, start, stop, timeout_s=timeout_s)
    except UnreadableUrl as error:
        # Backends refuse a range behind the end in ways of their own; the size tells.
        if is_passing(error) and status_of(error) != 416:
            raise
        if not _ends_before(url, start, timeout_s=timeout_s):
            raise
        return b""
    if len(content) > stop - start:
        raise UnreadableUrl(url, WHOLE_FILE) from ValueError(WHOLE_FILE)
    return content


def within(timeout_s: float | None, call: Callable[[], Result]) -> Result:
    """The result of a call; `TimeoutError` if it takes longer, and then nobody waits for it."""
    if timeout_s is None:
        return call()
    results: list[Result] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(call())
        except BaseException as error:  # noqa: BLE001 - it is raised by the waiting thread
            errors.append(error)

    thread = threading.Thread(target=run, name="read within a time limit", daemon=True)
    thread.start()
    thread.join(timeout_s)
    if thread.is_alive():
        raise TimeoutError(f"no answer within {timeout_s:g} s")
    if errors:
        raise errors[0]
    return results[0]


@contextmanager
def opened(url: str) -> Iterator[IO[bytes]]:
    """A file to read and to seek in."""
    read_range(url, 0, 1)  # HTTP's `open` takes every refusal for a missing file; this does not
    filesystem, path = open_filesystem(url)
    with _reading(url):
        file = filesystem.open(path, "rb")
    with file:
        yield io.BufferedReader(_RawFile(url, file))


def remove(url: str) -> None:
    filesystem, path = open_filesystem(url)
    with _writing(url):
        filesystem.rm(path)


def copy_file(url: str, path: Path) -> None:
    """Copy a file to this machine. Errors as of `read_bytes`."""
    filesystem, source = open_filesystem(url)
    with _reading(url):
        filesystem.get_file(source, str(path))


def remove_directory(url: str) -> None:
    """With all that is in it."""
    filesystem, path = open_filesystem(url)
    with _writing(url):
        filesystem.rm(path, recursive=True)


def write_bytes(
    url: str, payload: bytes | memoryview, *, by: str | None = None, durable: bool = False
) -> None:
    """by: name of the writer, where several may write the file at a time. durable: a local
    file is on the disk when this returns, not only in the memory of the system.
    """
    with replacing(url, by=by) as file:
        file.write(payload)
        if durable and "://" not in url:
            file.flush()
            os.fsync(file.fileno())


@contextmanager
def replacing(url: str, *, by: str | None = None) -> Iterator[IO[bytes]]:
    """A file to write, under another name until the block ends well; then it takes its place.

    by: as in `write_bytes`.
    """
    filesystem, path = open_filesystem(url)
    partial = f"{path}.partial" if by is None else f"{path}.{by}.partial"
    with _writing(url):
        filesystem.makedirs(directory_of(path), exist_ok=True)
    try:
        with _writing(url):
            file = filesystem.open(partial, "wb")
        try:
            yield file
        finally:
            with _writing(url):
                file.close()
        with _writing(url):
            filesystem.mv(partial, path)
    except BaseException:
        with _writing(url):
            if filesystem.exists(partial):
                filesystem.rm(partial)
        raise


class _RawFile(io.RawIOBase):
    """A backend's file, with its errors told as those of any other read."""

    def __init__(self, url: str, file: Any) -> None:
        self._url = url
        self._file = file

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        view = memoryview(buffer)
        with _reading(self._url):
            content = self._file.read(len(view))
        view[: len(content)] = content
        return len(content)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        with _reading(self._url):
            return int(self._file.seek(offset, whence))


@contextmanager
def _reading(url: str) -> Iterator[None]:
    try:
        yield
    except (FileNotFoundError, NotADirectoryError, DataError):
        raise
    except Exception as error:
        raise UnreadableUrl(url, _reason(error)) from error


@contextmanager
def _writing(url: str) -> Iterator[None]:
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        raise OSError(f"{url}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    return str(error) or type(error).__name__


def _ends_before(url: str, start: int, *, timeout_s: float | None) -> bool:
    """Whether the file is known to have no byte at `start`."""
    try:
        return size_of(url, timeout_s=timeout_s) <= start
    except (FileNotFoundError, UnreadableUrl):
        return False


def _open_for_one_attempt(url: str) -> tuple[Any, str]:
    """`open_filesystem`, without the retries of a backend that nobody counts or limits in time."""
    protocol = url.partition("://")[0]
    if protocol not in S3_PROTOCOLS:
        return open_filesystem(url)
    configured = fsspec.config.conf.get(protocol, {}).get("config_kwargs", {})
    settings = {"max_pool_connections": 100, **configured, "retries": {"total_max_attempts": 1}}
    filesystem, path = open_filesystem(url, config_kwargs=settings)
    filesystem.retries = 1
    return filesystem, path


def _fetch_range(
    filesystem: Any, path: str, start: int, stop: int, *, timeout_s: float | None
) -> bytes:
    if isinstance(filesystem, LocalFileSystem):
        return _read_local(path, start, stop)
    if isinstance(filesystem, AsyncFileSystem):
        fetch = filesystem._cat_file
        return bytes(_awaited(filesystem, fetch, path, start=start, end=stop, timeout_s=timeout_s))
    return bytes(within(timeout_s, lambda: filesystem.cat_file(path, start=start, end=stop)))


def _awaited(
    filesystem: AsyncFileSystem,
    function: Any,
    *arguments: Any,
    timeout_s: float | None,
    **named: Any,
) -> Any:
    """What a coroutine of a backend returns; when its time is over, it is cancelled."""
    try:
        return sync(filesystem.loop, function, *arguments, timeout=timeout_s, **named)
    except TimeoutError as error:
        if str(error):
            raise
        raise TimeoutError(f"no answer within {timeout_s or 0:g} s") from error


def _read_local(path: str, start: int, stop: int) -> bytes:
    """By `pread`: a mapping of a file that is cut meanwhile would kill the process (SIGBUS)."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        stop = min(stop, os.fstat(descriptor).st_size)
        parts = []
        while start < stop and (part := os.pread(descriptor, stop - start, start)):
            parts.append(part)
            start += len(part)
    finally:
        os.close(descriptor)
    return parts[0] if len(parts) == 1 else b"".join(parts)
