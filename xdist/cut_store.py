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
        self._known: dict[int, LeadSnapshot] = {}
        """Step -> what only server 0 has of a cut that is to be saved."""
        self._term = 0
        self._dropped: set[int] = set()
        """Steps of cuts that the server will come to, and is not to keep."""
        self._owed: set[int] = set()
        """Steps of cuts that are to be saved yet."""
        self._saves: dict[int, asyncio.Task[ServerSave]] = {}
        """Of cuts that are being saved, and of the last one that is."""
        self._changes = Changes()

    def keep(self, step: int, tensors: dict[str, Tensor]) -> None:
        """The server has come to a cut. tensors: as of `RangeState.tensors`."""
        if step in self._dropped:
            self._dropped.remove(step)
            return
        self._kept[step] = tensors
        self._changes.tell()

    def drop(self, step: int, term: int) -> None:
        """A cut of a term is not to be saved, whether the server has come to it or not yet."""
        if term == self._term and self._kept.pop(step, None) is None:
            self._dropped.add(step)

    def begin_term(self, term: int) -> None:
        """What was dropped before is another cut, if there will be one of its step."""
        self._term = term
        self._dropped.clear()

    def __contains__(self, step: int) -> bool:
        return step in self._kept

    async def save(self, step: int, url: str, known: LeadSnapshot | None) -> ServerSave:
        """Write the parts of a cut into the checkpoint directory `url`, once it is kept. To be
        called in the order of cuts; again for one that was not saved; and again, for the same
        answer, where a new term has begun meanwhile with the same cut.

        known: what only server 0 has of it; the first time.
        """
        if known is not None:
            self._known.setdefault(step, known)
        if step not in self._saves:
            self._owed.add(step)
            self._saves[step] = asyncio.create_task(self._save(step, url))
        return await asyncio.shield(self._saves[step])

    async def _save(self, step: int, url: str) -> ServerSave:
        await self._changes.until(lambda: step in self._kept)
        known = self._known.get(step)
        try:
            parts = await asyncio.to_thread(self._write, url, self._kept[step], known)
        except RunDirectoryError as error:
            del self._saves[step]
            return ServerSave(unsaved=str(error))
        self._owed.remove(step)
        for past in {past for past in (*self._kept, *self._known) if past <= step} - self._owed:
            self._kept.pop(past, None)
            self._known.pop(past, None)
        for past in {past for past in self._saves if past < step} - self._owed:
            del self._saves[past]
        return ServerSave(parts, () if known is None else known.corrupt)

    def _write(
        self, url: str, tensors: dict[str, Tensor], known: LeadSnapshot | None
    ) -> tuple[Part, ...]:
        start, stop = self._plan.start, self._plan.stop
        part = checkpoint.write_range(url, tensors, start=start, stop=stop)
        if known is None:
            return (part,)
        return (part, checkpoint.write_statistics(url, known.statistics))
