"""Updates: the commits that a server has heard of, made in the order of versions.

Each push of them is answered, with weights where its worker sees none, and freed. The state of a
cut is kept.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from xdist import wire
from xdist.answers import Answers
from xdist.background import Background
from xdist.commit_queue import CommitQueue
from xdist.cut_store import CutStore
from xdist.sequencer import Commit, PushId
from xdist.server_messages import Reply
from xdist.server_range import ServerRange
from xdist.staging import Staging


class Updates:
    """Those of one server."""

    def __init__(
        self,
        range_: ServerRange,
        *,
        queue: CommitQueue,
        staging: Staging,
        answers: Answers,
        cuts: CutStore,
        share: Callable[[wire.WireVector], Any],
        background: Background,
    ) -> None:
        """share: of `ParameterServer`."""
        self._range = range_
        self._queue = queue
        self._staging = staging
        self._answers = answers
        self._cuts = cuts
        self._share = share
        self._background = background

    async def make_due(self) -> None:
        """Make those that follow the version that the server is at."""
        async with self._range.at_rest:
            while due := self._queue.due(self._range.version):
                await self._make(due)

    async def keep_if_due(self) -> None:
        """Keep the state as it is, if it is that of a cut."""
        async with self._range.at_rest:
            await self._keep_if_due()

    async def _make(self, due: Sequence[Commit]) -> None:
        version = due[-1].version
        wanting = self._answers.want_weights([name for commit in due for name in commit.pushes])
        weights = await self._range.update(
            lambda: [self._staging.step(commit) for commit in due], version, is_wanted=bool(wanting)
        )
        for commit in due:
            self._queue.remove(commit)
            for name in commit.pushes:
                self._staging.free(name)
        self._answer(due, Reply(version, None), but=wanting)
        if weights is not None:
            self._background.run(self._answer_with(weights, due, version))
        await self._keep_if_due()

    async def _keep_if_due(self) -> None:
        """Keep a copy of the state, if it is that of a cut. To be called at rest."""
        if self._queue.take_kept(version := self._range.version):
            self._cuts.keep(version, await self._range.copy())

    def _answer(self, commits: Sequence[Commit], reply: Reply, *, but: Sequence[PushId]) -> None:
        for commit in commits:
            for name in commit.pushes:
                if name not in but:
                    self._answers.give(name, replace(reply, commit=commit))

    async def _answer_with(
        self, weights: wire.WireVector, commits: Sequence[Commit], version: int
    ) -> None:
        """Answer those who wait for weights, which are stored beside the next pass."""
        stored = await asyncio.to_thread(self._share, weights)
        self._answer(commits, Reply(version, stored), but=())
