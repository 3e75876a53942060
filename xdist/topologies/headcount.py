"""Headcount: how few workers may form a group, and whether others will have room to come."""

from __future__ import annotations

import time

from xdist.config import ClusterConfig
from xdist.errors import NotEnoughResources
from xdist.topologies.staff import Staff


class Headcount:
    """Of one launch of a synchronous run. is_first, below: whether no group has formed yet; those
    of the first one begin with the checkpoint's state, later ones get it from others.
    """

    def __init__(self, cluster: ClusterConfig, staff: Staff) -> None:
        self._cluster = cluster
        self._staff = staff
        self._lacking_since: float | None = None

    def look(self, *, is_first: bool) -> None:
        """Remember since when too few have a place. To be called while no group is at work."""
        if self._num_placed(is_first) < self._num_wanted(is_first):
            self._lacking_since = self._lacking_since or time.monotonic()
        else:
            self.suffices()

    def suffices(self) -> None:
        """A group has formed."""
        self._lacking_since = None

    @property
    def lacks_room(self) -> bool:
        """Whether too few have had a place for too long."""
        since = self._lacking_since
        return since is not None and time.monotonic() - since > self._cluster.wait_s

    def _num_placed(self, is_first: bool) -> int:
        return self._staff.num_placed(with_state=is_first)

    def _num_wanted(self, is_first: bool) -> int:
        """Workers that a group needs: the first one all that had a place at the launch."""
        return self._staff.num_together if is_first else self._cluster.min_world_size

    def fewest(self, *, is_first: bool) -> int:
        """The same, or as few as may be if there is no room for more."""
        return self._cluster.min_world_size if self.lacks_room else self._num_wanted(is_first)

    @property
    def is_first_lost(self) -> bool:
        """Whether nobody will come who can begin with the checkpoint's state."""
        return self.lacks_room and not self._num_placed(is_first=True)

    def check(self) -> None:
        """Raise `NotEnoughResources` when there is nobody to wait for."""
        if not self.lacks_room:
            return
        cluster, num_placed = self._cluster, self._num_placed(is_first=False)
        if num_placed < cluster.min_world_size:
            raise NotEnoughResources(
                f"there is room for {num_placed} workers that can start, cluster.min_world_size "
                f"is {cluster.min_world_size}, and nothing else was free within "
                f"{cluster.wait_s:g} s (cluster.wait_s); add nodes, or end what else runs; "
                "the same command resumes from the last checkpoint"
            )
