"""Fork client: what Ray starts in place of a worker's process. It asks the node's fork server for
a copy of itself; where there is none, it becomes the process that Ray would have started.

It is passed to `python -S -E -c`, with the worker's command line: it stands alone.
"""

import json
import os
import socket
import struct
import sys

PATIENCE_S = 60.0
"""A fork server may still be importing."""
NODE_ID = "--node-id="
SIZE = struct.Struct("!I")
"""Of the request, which follows it."""
CREDENTIALS = struct.Struct("3i")
"""Process, user and group."""


def socket_name(node_id: str, job_id: str) -> str:
    """Of a fork server: an abstract Unix socket."""
    return f"\0xdist-fork-{node_id}-{job_id}"


def is_ours(connection: socket.socket) -> bool:
    """Whether a process of this user is at the other end."""
    peer = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, CREDENTIALS.size)
    return bool(CREDENTIALS.unpack(peer)[1] == os.getuid())


def ask(command: list[str]) -> bool:
    """Whether a fork server has started this command, with what this process has."""
    node_ids = [word[len(NODE_ID) :] for word in command if word.startswith(NODE_ID)]
    if not node_ids or "RAY_JOB_ID" not in os.environ:
        return False
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(PATIENCE_S)
        connection.connect(socket_name(node_ids[0], os.environ["RAY_JOB_ID"]))
        if not is_ours(connection):
            return False
        wanted = {"command": command, "variables": dict(os.environ), "directory": os.getcwd()}
        text = json.dumps(wanted).encode()
        socket.send_fds(connection, [SIZE.pack(len(text))], [0, 1, 2])
        connection.sendall(text)
        return bool(connection.recv(1))


if __name__ == "__main__":
    try:
        is_forked = ask(sys.argv[1:])
    except OSError:
        is_forked = False
    if not is_forked:
        os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
