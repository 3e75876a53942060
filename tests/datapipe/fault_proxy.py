"""A proxy in front of an HTTP server that fails some of the requests, those for ranges of shards or
all.
"""

from __future__ import annotations

import http.client
import random
import threading
from collections.abc import Mapping
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Literal, Self
from urllib.parse import urlsplit

Fault = Literal["refuse", "throttle", "deny", "stall", "cut", "shorten"]
"""503; 429; 403; no answer; a connection that is closed in the middle of the body; fewer bytes than
asked for, as if the file ended. (A connection that is closed before any answer is none of them:
aiohttp then sends the request again by itself.)"""
STATUSES: dict[Fault, int] = {"refuse": 503, "throttle": 429, "deny": 403}


class FaultProxy:
    """Forwards what reads to `upstream` from `url` inside the block.

    faults: by the number of the request, among those for a range of a .tar, or with `everywhere`
    among all. `served` lists those that came up so far. gather: so many such requests are held
    until they are all there.
    """

    def __init__(
        self,
        upstream: str,
        faults: Mapping[int, Fault] | None = None,
        *,
        gather: int = 1,
        everywhere: bool = False,
    ) -> None:
        self.served: list[Fault] = []
        self.ended = threading.Event()
        self.gathered = threading.Barrier(gather)
        self.everywhere = everywhere
        self._faults = faults or {}
        self._num_requests = 0
        self._lock = threading.Lock()
        handler = partial(_Handler, self, urlsplit(upstream).netloc)
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def next_fault(self) -> Fault | None:
        """That of the request which has just come."""
        with self._lock:
            fault = self._faults.get(self._num_requests)
            self._num_requests += 1
            if fault is not None:
                self.served.append(fault)
        return fault

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
        self.gathered.abort()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def one_in_five(*, seed: int, num_requests: int, num_stalls: int) -> dict[int, Fault]:
    """A plan of faults; stalls are few, because each costs a whole time limit."""
    drawn = random.Random(seed)
    numbers = [number for number in range(num_requests) if drawn.random() < 0.2]
    kinds: list[Fault] = ["refuse", "throttle", "cut", "shorten"]
    faults = {number: drawn.choice(kinds) for number in numbers}
    return faults | dict.fromkeys(numbers[:num_stalls], "stall")


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # Who sends a body may wait for "100 Continue".

    def __init__(self, proxy: FaultProxy, upstream: str, *arguments: object) -> None:
        self._proxy = proxy
        self._upstream = upstream
        super().__init__(*arguments)  # type: ignore[arg-type]

    def _forward(self) -> None:
        self.close_connection = True
        self._body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        fault: Fault | None = None
        if self._proxy.everywhere or ("Range" in self.headers and self.path.endswith(".tar")):
            self._proxy.gathered.wait(timeout=20)
            fault = self._proxy.next_fault()
        if fault == "stall":
            self._proxy.ended.wait()
        elif fault in STATUSES:
            self.send_error(STATUSES[fault])
        else:
            self._answer(fault)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _forward

    def _answer(self, fault: Fault | None) -> None:
        connection = http.client.HTTPConnection(self._upstream, timeout=20)
        connection.request(self.command, self.path, self._body, dict(self.headers))
        response = connection.getresponse()
        content = response.read()
        connection.close()
        length = response.getheader("Content-Length", str(len(content)))
        if fault is not None:
            content = content[: len(content) // 2]
        if fault == "shorten":
            length = str(len(content))
        self.send_response(response.status)
        for name, value in response.getheaders():
            if name.lower() not in ("content-length", "transfer-encoding", "connection"):
                self.send_header(name, value)
        self.send_header("Content-Length", length)
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""
