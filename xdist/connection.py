"""The connection of a driver to its Ray cluster. It needs no torch: a job connects first, and while
its own imports go on, so do those of the cluster's fork servers.
"""

from __future__ import annotations

import logging

import ray

from xdist import fork_servers
from xdist.config import ClusterConfig
from xdist.errors import UserError


def connect(cluster: ClusterConfig | None = None) -> None:
    """Connect to the cluster: that of RAY_ADDRESS, a local one, or a new one of this process.
    cluster: how actors are about to run there, if any are.
    """
    if not ray.is_initialized():
        fork_servers.forget()
        try:
            ray.init(logging_level=logging.WARNING)
        except Exception as error:  # Ray raises bare ones, as when it starts too slowly.
            raise UserError(
                f"no Ray cluster: {error}; start one with `ray start --head`"
            ) from error
    if cluster is not None:
        fork_servers.start(cluster)
