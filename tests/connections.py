"""TCP connections between processes of this machine: what is under way in them, and their end."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass

import pytest


@dataclass(frozen=True)
class Connection:
    """As one of its two processes has it."""

    own: str
    """Address and port."""
    peer: str
    num_unread: int
    """Bytes that have come, and that the process has not read."""

    def cut(self) -> None:
        """Reset it, as a device does that has forgotten it; both sides learn of that. Skips the
        test where the kernel cannot.
        """
        own, peer = (address.rpartition(":")[2] for address in (self.own, self.peer))
        which = ["sport", "=", f":{own}", "and", "dport", "=", f":{peer}"]
        if f":{own}" not in _ss("-tnHK", *which):
            pytest.skip("ss -K cannot cut a connection here; it needs CONFIG_INET_DIAG_DESTROY")


def between(process_id: int, other: int) -> list[Connection]:
    """The connections of a process to another one. Skips the test where there is no ss."""
    if shutil.which("ss") is None:
        pytest.skip("needs ss: apt-get install -y iproute2")
    mine, theirs = _of(process_id), {(each.peer, each.own) for each in _of(other)}
    return [each for each in mine if (each.own, each.peer) in theirs]


def _of(process_id: int) -> list[Connection]:
    found = []
    for line in _ss("-tnpH").splitlines():
        _state, num_unread, _num_unsent, own, peer, *processes = line.split()
        if any(f"pid={process_id}," in each for each in processes):
            found.append(Connection(own, peer, int(num_unread)))
    return found


def _ss(*arguments: str) -> str:
    return subprocess.run(["ss", *arguments], capture_output=True, check=True, text=True).stdout
