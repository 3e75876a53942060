"""LineFile: JSON objects, one a line, none of which is lost where the disk is full for a while."""

from __future__ import annotations

import errno
import json
import logging
import os
import threading
from collections import deque
from contextlib import suppress
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)


class LineFile:
    """Only appended to. What cannot be written now is written with what comes next."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._unwritten: deque[str] = deque()
        self._lock = threading.Lock()
        self._has_failed = False
        self._is_torn = False
        """Whether the last line in the file may lack its end."""

    def append(self, *values: dict[str, Any]) -> None:
        """Add lines."""
        self._unwritten.extend(map(json.dumps, values))
        self.flush()

    def flush(self) -> None:
        """Write what could not be written yet; by any thread."""
        try:
            with self._lock:
                self._write()
        except OSError as error:
            self._is_torn = True
            if not self._has_failed:
                logger.warning("%s waits for its disk: %s", self.path, error)
            self._has_failed = True
        else:
            self._has_failed = False

    def _write(self) -> None:
        if self._is_torn:
            self.end_last_line()
            self._is_torn = False
        while self._unwritten:
            self._write_whole(f"{self._unwritten[0]}\n".encode())
            self._unwritten.popleft()

    def _write_whole(self, line: bytes) -> None:
        """Or nothing of it."""
        with self.path.open("ab", buffering=0) as file:
            size = file.seek(0, os.SEEK_END)
            try:
                if file.write(line) < len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError:
                with suppress(OSError):
                    file.truncate(size)
                raise

    def end_last_line(self) -> None:
        """A crash may have cut it short; what comes next is a line of its own. Raises `OSError`."""
        with self.path.open("ab+") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - 1))
            if size and file.read(1) != b"\n":
                file.write(b"\n")
