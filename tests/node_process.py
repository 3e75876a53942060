"""A worker node that joins a head, until SIGTERM: python node_process.py ADDRESS IP CPUS FILE

Its id and that of this process are written to FILE once the head lists it as alive.
`ray start --address` refuses a node while Ray is held to loopback, so this makes the node itself.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from threading import Event

from ray import NodeID
from ray._private.node import Node
from ray._private.parameter import RayParams
from tenacity import Retrying, retry_if_result, wait_fixed


def main(address: str, ip: str, num_cpus: str, file: Path) -> None:
    """Run the node."""
    is_to_end = Event()
    # Ray's threads have the signal unblocked: waiting for it (sigwait) would not keep it from them.
    signal.signal(signal.SIGTERM, lambda *_: is_to_end.set())
    parameters = RayParams(
        gcs_address=address,
        num_cpus=int(num_cpus),
        node_ip_address=ip,
        dashboard_agent_listen_port=0,
    )
    # Its reaper would end the process group; who started this process does that, and at once.
    node = Node(parameters, head=False, shutdown_at_exit=False, spawn_reaper=False)
    gcs = node.get_gcs_client()
    node_id = NodeID.from_hex(node.node_id)
    retrying = Retrying(retry=retry_if_result(lambda is_alive: not is_alive), wait=wait_fixed(0.1))
    retrying(lambda: gcs.check_alive([node_id], timeout=5)[0])
    partial = file.with_suffix(".partial")
    partial.write_text(f"{node.node_id} {os.getpid()}")
    os.replace(partial, file)
    is_to_end.wait()
    node.kill_all_processes(check_alive=False, allow_graceful=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], Path(sys.argv[4]))
