"""Whether all parameter servers of a run have made the same updates when it ends."""

from __future__ import annotations

from typing import Any

import ray

from tests.clusters import wait_until
from xdist import checkpoint
from xdist.topologies import RunPlan
from xdist.topologies.push_pull import PushPullTopology


class EndsAtOneVersion:
    """A topology whose servers, and their replicas, are at the version of the last checkpoint when
    it is closed at the run's end.
    """

    def __init__(self, plan: RunPlan, **how: Any) -> None:
        """how: arguments of `PushPullTopology`."""
        self._plan = plan
        self._topology = PushPullTopology(plan, **how)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._topology, name)

    def close(self) -> None:
        latest = checkpoint.latest(self._plan.run_dir)
        is_open = any(self._topology._servers)  # Not closed before.
        if is_open and latest is not None and latest.manifest.cut.is_final:
            wait_until(lambda: self._versions() == {latest.manifest.cut.step} or None)
        self._topology.close()

    def _versions(self) -> set[int]:
        servers = self._topology._servers
        asked = [
            hand.actor.pulse.remote(0)
            for hand in servers
            if hand in servers.primaries or hand.life in servers._attached
        ]
        return set(ray.get(asked))
