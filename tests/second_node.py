"""A worker node of a local cluster, bound to loopback, until SIGTERM: python second_node.py ADDRESS

`ray start --address` refuses a node while Ray is held to loopback, so this makes the node itself.
"""

from __future__ import annotations

import signal
import sys

from ray._private.node import Node
from ray._private.parameter import RayParams


def main() -> None:
    """Run the node; 2 CPUs."""
    parameters = RayParams(
        gcs_address=sys.argv[1],
        num_cpus=2,
        node_ip_address="127.0.0.1",
        dashboard_agent_listen_port=0,
    )
    node = Node(parameters, head=False, shutdown_at_exit=True)
    signal.sigwait([signal.SIGTERM])
    node.kill_all_processes(check_alive=False, allow_graceful=True)


if __name__ == "__main__":
    main()
