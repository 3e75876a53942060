"""A local HTTP server of a directory, which can refuse files and ignore ranges."""

from __future__ import annotations

import re
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any, Self


class FileServer:
    """Serves `directory` at `url` inside the block.

    refused: the status with which a file of that name, or "" for the listing, is refused.
    held: the names of files that are never answered for; `asked` is set once one is asked for.
    latency_s: to pass before a range is answered for.
    """

    def __init__(
        self, directory: Path, *, ignores_ranges: bool = False, latency_s: float = 0.0
    ) -> None:
        self.refused: dict[str, int] = {}
        self.held: set[str] = set()
        self.asked, self.ended = threading.Event(), threading.Event()
        self.ignores_ranges = ignores_ranges
        self.latency_s = latency_s
        handler = partial(_Handler, self, directory=str(directory))
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.ended.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Handler(SimpleHTTPRequestHandler):
    def __init__(self, files: FileServer, *arguments: Any, directory: str) -> None:
        self._files = files
        super().__init__(*arguments, directory=directory)

    def do_GET(self) -> None:
        name = self.path.strip("/")
        requested = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if name in self._files.held:
            self._files.asked.set()
            self._files.ended.wait()
        elif name in self._files.refused:
            self.send_error(self._files.refused[name])
        elif requested is None or self._files.ignores_ranges:
            super().do_GET()
        else:
            self._send_range(int(requested[1]), int(requested[2]) + 1)

    def do_HEAD(self) -> None:
        name = self.path.strip("/")
        if name in self._files.refused:
            self.send_error(self._files.refused[name])
        else:
            super().do_HEAD()

    def _send_range(self, start: int, stop: int) -> None:
        path = Path(self.translate_path(self.path))
        if not path.is_file():
            self.send_error(404)
            return
        self._files.ended.wait(self._files.latency_s)
        if start >= path.stat().st_size:
            self.send_error(416)
            return
        with path.open("rb") as file:
            file.seek(start)
            content = file.read(stop - start)
        self.send_response(206)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet."""
