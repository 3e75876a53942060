"""ServerRange: the weights of a parameter server, and all that changes with them.

Updates are made beside the event loop, in a thread. Who holds `at_rest` may change the range, or
read it.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import TypeVar

from torch import Tensor

from xdist import wire
from xdist.node_memory import NodeMemory
from xdist.server_plan import ServerPlan
from xdist.state import RangeState, copies
from xdist.update import Step
from xdist.weights_board import BoardAddress

Result = TypeVar("Result")
NICER = 4
"""Than the rest of the process. Where workers share its cores, what they have left to do for their
pushes comes first, and a pass makes more updates; where a core is free, it makes no difference.
"""


class ServerRange:
    """At one version after the other."""

    def __init__(self, plan: ServerPlan, memory: NodeMemory) -> None:
        """memory: where workers of this node see the weights."""
        self.version = 0
        self.at_rest = asyncio.Lock()
        self._plan = plan
        self._memory = memory
        self._state: RangeState
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="updates", initializer=_be_nicer)

    def load(self, tensors: dict[str, Tensor], *, version: int) -> None:
        """Be what `tensors` (as of `RangeState.tensors`) say."""
        self._state, self.version = self._plan.range_state(tensors), version

    async def open_board(self) -> BoardAddress | None:
        """Where workers of this node see the weights from now on; None where that cannot be."""
        async with self.at_rest:
            return await self._in_thread(self._memory.open_board, self._state, self.version)

    def weights(self) -> wire.WireVector:
        """A copy of them, as it is sent. To be called at rest."""
        return self._memory.copy(self._state)

    async def update(
        self, make_steps: Callable[[], Sequence[Step]], version: int, *, is_wanted: bool
    ) -> wire.WireVector | None:
        """Make the updates that lead to a version, in one pass, which for several takes little
        longer than for one: so a server with more to do than it can gets faster. Returns `weights`
        if they are wanted. To be called at rest.
        """

        def make() -> wire.WireVector | None:
            return self._memory.update(self._state, make_steps(), version, is_wanted=is_wanted)

        made = await self._in_thread(make)
        self.version = version
        return made

    async def copy(self) -> dict[str, Tensor]:
        """Of all of it, made beside the event loop. To be called at rest."""
        return await self._in_thread(lambda: copies(self._state.tensors()))

    async def _in_thread(self, function: Callable[..., Result], *arguments: object) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, *arguments)


def _be_nicer() -> None:
    """This thread, and those that it starts."""
    with suppress(OSError):  # Where threads have no priority of their own.
        thread = threading.get_native_id()
        priority = os.getpriority(os.PRIO_PROCESS, thread)
        os.setpriority(os.PRIO_PROCESS, thread, priority + NICER)
