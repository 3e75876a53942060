"""CutStore: the states of cuts, from when a server has come to them until they are saved."""

from __future__ import annotations

import asyncio

from torch import Tensor

from xdist import checkpoint
from xdist.changes import Changes
from xdist.checkpoint import Part
from xdist.errors import RunDirectoryError
from xdist.lead import LeadSnapshot
from xdist.server_messages import ServerSave
from xdist.server_plan import ServerPlan


class CutStore:
    """One that cannot be written is kept, to be saved again. One that nobody asked for before a
    later one was saved was of a term that had ended, and is dropped.
    """

    def __init__(self, plan: ServerPlan) -> None:
        self._plan = plan
        self._kept: dict[int, dict[str, Tensor]] = {}
        """Step -> tensors of the range."""
        self._saving: dict[int, LeadSnapshot | None] = {}
        """Step of a cut that is being saved -> what only server 0 has of it."""
        self._changes = Changes()

    def keep(self, step: int, tensors: dict[str, Tensor]) -> None:
        """The server has come to a cut. tensors: as of `RangeState.tensors`."""
        self._kept[step] = tensors
        self._changes.tell()

    def __contains__(self, step: int) -> bool:
        return step in self._kept

    async def save(self, step: int, url: str, known: LeadSnapshot | None) -> ServerSave:
        """Write the parts of a cut into the checkpoint directory `url`, once it is kept. To be
        called in the order of cuts, and again for one that was not saved.

        known: what only server 0 has of it; when it is saved again, it is known already.
        """
        known = self._saving.setdefault(step, known)
        await self._changes.until(lambda: step in self._kept)
        try:
            parts = await asyncio.to_thread(self._write, url, self._kept[step], known)
        except RunDirectoryError as error:
            return ServerSave(unsaved=str(error))
        del self._saving[step]
        for kept in [kept for kept in self._kept if kept <= step and kept not in self._saving]:
            del self._kept[kept]
        return ServerSave(parts, () if known is None else known.corrupt)

    def _write(
        self, url: str, tensors: dict[str, Tensor], known: LeadSnapshot | None
    ) -> tuple[Part, ...]:
        start, stop = self._plan.start, self._plan.stop
        part = checkpoint.write_range(url, tensors, start=start, stop=stop)
        if known is None:
            return (part,)
        return (part, checkpoint.write_statistics(url, known.statistics))
