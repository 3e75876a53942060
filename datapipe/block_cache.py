"""BlockCache: ranges of remote files, kept on a local disk within a bound.

It survives restarts, and any number of processes of one machine share it. The directory holds one
file a range, named by what is in it, and `usage`: the bytes of all of them, behind a lock that the
kernel takes from a process that dies. A range is written under another name, locked by its writer,
and renamed when it is whole; what nobody locks any more was left by a dead writer and is deleted.
Its place is set aside before it is written, so the bound holds at every moment. The ranges that
were not read for longest make room for others.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import re
import struct
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

logger = logging.getLogger(__name__)

HEADER = struct.Struct("<8sIQ")
"""Of a file: mark, crc32 and number of the bytes that follow."""
MARK = b"datapip1"
USAGE_NAME = "usage"
RANGE_FILE = re.compile(r"[0-9a-f]{62}\.(range|partial)")
SHARE_KEPT = 0.9
"""Of the bound, when ranges are deleted: else every write would look through the directory."""
LOCK_POLL_S = 0.002


@dataclass(frozen=True)
class _Kept:
    path: str
    size: int
    last_use_ns: int


class BlockCache:
    """Keeps ranges of files by name. For use by several threads.

    Where the directory cannot be used, is full or forbidden, this is said once and nothing is kept
    from then on: a cache is never the reason why a read fails.
    """

    def __init__(self, directory: str, *, max_bytes: int, lock_wait_s: float = 30.0) -> None:
        """lock_wait_s: how long a process may hold the lock, before it is taken for stopped."""
        self._directory = Path(directory).expanduser()
        self._max_bytes = max_bytes
        self._lock_wait_s = lock_wait_s
        self._off = threading.Event()
        self._warning = threading.Lock()
        with self._or_off():
            self._directory.mkdir(parents=True, exist_ok=True)
            with self._locked_usage() as usage:
                _write_usage(usage, self._make_room(0))

    def get(self, name: str) -> memoryview | None:
        """What was put under this name; None where it is not here, or is damaged."""
        path = self._path(name)
        try:
            content = path.read_bytes()
        except OSError:
            return None
        payload = _payload(content)
        with contextlib.suppress(OSError):  # another process may have deleted it
            if payload is None:
                path.unlink()
            else:
                _mark_used(path)
        return payload

    def put(self, name: str, payload: bytes) -> None:
        """Keep a range, where there is room for it at all and nobody else is writing it."""
        size = HEADER.size + len(payload)
        if self._off.is_set() or size > self._max_bytes * SHARE_KEPT:
            return
        path = self._path(name)
        partial = path.with_suffix(".partial")
        with self._or_off(), self._set_aside(path, partial, size) as descriptor:
            if descriptor is None:
                return
            with open(descriptor, "wb", closefd=False) as file:
                file.write(HEADER.pack(MARK, zlib.crc32(payload), len(payload)))
                file.write(payload)
            _mark_used(descriptor)
            with self._locked_usage():  # or who looks through the directory might miss both
                os.rename(partial, path)

    def _path(self, name: str) -> Path:
        digest = hashlib.sha256(name.encode()).hexdigest()
        return self._directory / digest[:2] / f"{digest[2:]}.range"

    @contextlib.contextmanager
    def _or_off(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            with self._warning:
                if not self._off.is_set():
                    self._off.set()
                    logger.warning(
                        "cache keeps nothing more directory=%s reason=%s", self._directory, error
                    )

    @contextlib.contextmanager
    def _locked_usage(self) -> Iterator[int]:
        """The descriptor of the file with the bytes in use, locked. Raises `TimeoutError`."""
        with _opened(self._directory / USAGE_NAME) as usage:
            deadline = time.monotonic() + self._lock_wait_s
            while not _is_locked(usage):
                if time.monotonic() > deadline or self._off.wait(LOCK_POLL_S):
                    raise TimeoutError(f"another process holds it for {self._lock_wait_s:g} s")
            yield usage

    @contextlib.contextmanager
    def _set_aside(self, path: Path, partial: Path, size: int) -> Iterator[int | None]:
        """A file of that size to write, locked; None if there is no room, the range is here, or
        another one writes it.
        """
        path.parent.mkdir(exist_ok=True)
        with contextlib.ExitStack() as stack:
            with self._locked_usage() as usage:
                descriptor = None if path.exists() else stack.enter_context(_opened(partial))
                if descriptor is not None and not _is_locked(descriptor):
                    descriptor = None
                elif descriptor is not None:
                    stack.push(_unlinks_after_error(partial))
                    if self._reserve(usage, size):
                        os.truncate(descriptor, size)
                    else:
                        partial.unlink()
                        descriptor = None
            yield descriptor

    def _reserve(self, usage: int, size: int) -> bool:
        """Whether there is room, which then is taken."""
        used = _read_usage(usage)
        if used is None or used + size > self._max_bytes:
            used = self._make_room(size)
        has_room = used + size <= self._max_bytes
        _write_usage(usage, used + size if has_room else used)
        return has_room

    def _make_room(self, size: int) -> int:
        """Delete what was not used for longest, so that `size` bytes fit; the bytes then in use."""
        kept = sorted(self._kept(), key=lambda one: one.last_use_ns)
        used = sum(one.size for one in kept)
        if used + size <= self._max_bytes:
            return used
        for one in kept:
            if used + size <= self._max_bytes * SHARE_KEPT:
                break
            if one.path.endswith(".range"):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(one.path)
                used -= one.size
        return used

    def _kept(self) -> Iterator[_Kept]:
        """The ranges that are here or being written; what dead writers left is deleted."""
        for entry in os.scandir(self._directory):
            if len(entry.name) != 2 or not entry.is_dir():
                continue
            for file in os.scandir(entry):
                if RANGE_FILE.fullmatch(file.name) is None or _was_left(file.path):
                    continue
                with contextlib.suppress(FileNotFoundError):
                    facts = file.stat()
                    yield _Kept(file.path, facts.st_size, facts.st_mtime_ns)


def _was_left(path: str) -> bool:
    """Whether this was a range that a dead writer had begun; it is gone then."""
    if not path.endswith(".partial"):
        return False
    with contextlib.suppress(FileNotFoundError), _opened(path, flags=os.O_RDWR) as descriptor:
        if not _is_locked(descriptor):
            return False
        os.unlink(path)
    return True


def _payload(content: bytes) -> memoryview | None:
    """What follows a header that describes it."""
    if len(content) < HEADER.size:
        return None
    mark, crc32, size = HEADER.unpack_from(content)
    payload = memoryview(content)[HEADER.size :]
    is_whole = mark == MARK and len(payload) == size and zlib.crc32(payload) == crc32
    return payload if is_whole else None


def _mark_used(file: Path | int) -> None:
    now = time.time_ns()  # finer than the kernel's own time stamps
    os.utime(file, ns=(now, now))


def _read_usage(descriptor: int) -> int | None:
    content = os.pread(descriptor, 64, 0)
    return int(content) if content.isdigit() else None


def _write_usage(descriptor: int, used: int) -> None:
    os.pwrite(descriptor, b"%020d" % used, 0)


def _unlinks_after_error(path: Path) -> Callable[..., None]:
    """For an `ExitStack`."""

    def leave(kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            path.unlink(missing_ok=True)

    return leave


@contextlib.contextmanager
def _opened(path: Path | str, *, flags: int = os.O_RDWR | os.O_CREAT) -> Iterator[int]:
    descriptor = os.open(path, flags | os.O_CLOEXEC, 0o666)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _is_locked(descriptor: int) -> bool:
    """Whether the lock of that file is ours now."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
