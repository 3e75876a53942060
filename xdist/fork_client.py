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


def ask(command: list[str]) -> bool:
    """Whether a fork server has started this command, with what this process has."""
    node_ids = [word[len(NODE_ID) :] for word in command if word.startswith(NODE_ID)]
    if not node_ids:
        return False
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(PATIENCE_S)
        connection.connect(f"\0xdist-fork-{node_ids[0]}-{os.environ.get('RAY_JOB_ID')}")
        peer = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        if struct.unpack("3i", peer)[1] != os.getuid():
            return False
        wanted = {"command": command, "variables": dict(os.environ), "directory": os.getcwd()}
        text = json.dumps(wanted).encode()
        socket.send_fds(connection, [struct.pack("!I", len(text))], [0, 1, 2])
        connection.sendall(text)
        return bool(connection.recv(1))


if __name__ == "__main__":
    try:
        is_forked = ask(sys.argv[1:])
    except OSError:
        is_forked = False
    if not is_forked:
        os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
