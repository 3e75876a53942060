"""Door: whether the ranks of a group reach each other, which a collective that fails does not say.

Each rank listens at a port of its own as long as it is in the group. A connection there says that
the link is up, and so does one that is refused; where nothing comes back it is down, or the machine
is.
"""

from __future__ import annotations

import socket
import threading
import weakref
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial

LIMIT_S = 2.0
"""For a peer to answer a connection, which its kernel does, whatever the process is at; where
somebody is known to be lost.
"""
JOIN_LIMIT_S = 4.0
"""The same, where nobody is: a connection whose first packets are lost is tried again by the kernel
after one second, and after three.
"""
MOST_THREADS = 64
BACKLOG = 4096
"""Connections of peers that may wait for this process to run."""


class Door:
    """One rank's. It closes when nobody refers to it any more."""

    def __init__(self, own_address: str) -> None:
        listener = socket.create_server((own_address, 0), backlog=BACKLOG)
        threading.Thread(target=_welcome, args=[listener], daemon=True, name="door").start()
        self._close = weakref.finalize(self, _shut, listener)
        self.place = f"{own_address} {listener.getsockname()[1]}"
        """What the others need of it."""
        self._others: Mapping[int, tuple[str, int]] = {}

    def know(self, places: Mapping[int, str]) -> None:
        """The places of the other ranks, once all have opened theirs."""
        split = {rank: place.split() for rank, place in places.items()}
        self._others = {rank: (address, int(port)) for rank, (address, port) in split.items()}

    def unreached(self, *, limit_s: float = LIMIT_S) -> tuple[int, ...]:
        """The other ranks whose machines this one does not reach now, within a time limit."""
        if not self._others:
            return ()
        with ThreadPoolExecutor(min(MOST_THREADS, len(self._others))) as executor:
            are_reached = executor.map(partial(_is_reached, limit_s=limit_s), self._others.values())
            return tuple(
                rank
                for rank, is_reached in zip(self._others, are_reached, strict=True)
                if not is_reached
            )

    def close(self) -> None:
        self._close()


def _welcome(listener: socket.socket) -> None:
    """Let everybody in who comes, and out again, as long as it is open."""
    while True:
        try:
            listener.accept()[0].close()
        except ConnectionError:  # Of one who is gone again.
            continue
        except OSError:
            return


def _shut(listener: socket.socket) -> None:
    with suppress(OSError):  # On some systems, as it is connected to nobody.
        listener.shutdown(socket.SHUT_RDWR)  # Who waits for peers there is woken.
    listener.close()


def _is_reached(address: tuple[str, int], *, limit_s: float) -> bool:
    try:
        socket.create_connection(address, timeout=limit_s).close()
    except ConnectionError:  # Refused: by a machine that is reached.
        return True
    except OSError:
        return False
    return True
