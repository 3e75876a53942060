"""What a failed task means: somebody is lost, or the run cannot go on."""

from __future__ import annotations

import os
import re

from ray.exceptions import (
    NodeDiedError,
    ObjectLostError,
    ObjectStoreFullError,
    OutOfDiskError,
    OutOfMemoryError,
    RayActorError,
    RayError,
    RayTaskError,
    WorkerCrashedError,
)

from datapipe.errors import DataError, MissingShard, UnreadableUrl
from xdist.errors import LeaseLost, PeerLost, UserError
from xdist.topologies import Fault, Task

LOST = (
    RayActorError,
    ObjectLostError,
    NodeDiedError,
    WorkerCrashedError,
    OutOfMemoryError,
    OutOfDiskError,
)
NODE_IS_FULL = (ObjectStoreFullError, OutOfDiskError)
"""Errors within a task: its node has no place for what it sends."""
NEVER_RAN = ("The actor never ran", "node has died")
"""From the text of an `ActorDiedError`: its process had not started when its node went."""
GPU_ERROR = "AcceleratorError"
"""torch's name for what it cannot go on after: the process has lost its GPU."""
LOW_ON_MEMORY = re.compile(r"node running low on memory.*? was (.*? limit)", re.DOTALL)
"""What Ray says of an actor that it ended before the memory of its node was used up."""


def fault_of(task: Task, error: RayError) -> Fault | None:
    """What the error of a task says of its actor, or of others; None where it is no fault, but a
    bug, or something that the user can mend.
    """
    if isinstance(error, RayTaskError):
        if isinstance(error.cause, (PeerLost, LeaseLost)):
            return Fault(task, str(error.cause), "complaint")
        if task.is_alone:
            return Fault(task, last_line(error), "unfit")
        is_lost = (
            _is_of_its_node(error, task)
            or isinstance(error.cause, NODE_IS_FULL)
            or type(error.cause).__name__ == GPU_ERROR
        )
        return Fault(task, reason_of(error.cause), "lost") if is_lost else None
    if isinstance(error, RayActorError) and error.actor_init_failed:
        return Fault(task, last_line(error), "unfit") if task.is_alone else None
    if not isinstance(error, LOST):
        return None
    never_ran = all(words in str(error) for words in NEVER_RAN)
    return Fault(task, reason_of(error), "never_ran" if never_ran else "lost")


def cause_of(error: RayError) -> Exception:
    """What a run ends with that cannot go on for it: what the user can mend is itself, a bug has
    its own traceback.
    """
    cause = getattr(error, "cause", error)
    if not isinstance(cause, DataError | UserError):
        return error
    cause.__cause__ = error
    return cause


def _is_of_its_node(error: RayTaskError, task: Task) -> bool:
    """Whether another node may do what this one could not."""
    return task.action in ("join", "train") and (
        isinstance(error.cause, UnreadableUrl)
        or (isinstance(error.cause, MissingShard) and all(map(_is_seen, error.cause.urls)))
    )


def _is_seen(url: str) -> bool:
    """Whether a local file is seen here: then a node that lacks it has lost a file system."""
    return "://" not in url and os.path.exists(url)


def last_line(error: RayError) -> str:
    """Of a traceback: what the exception says, or the end of it."""
    return str(error).strip().splitlines()[-1]


def reason_of(error: BaseException) -> str:
    """What an error says, in a line; of a node without memory also what needs less."""
    if (low := LOW_ON_MEMORY.search(str(error))) is not None:
        need_less = "a smaller batch_size or more compute.accumulation_steps need less"
        return f"its node ran out of memory ({low[1]}); {need_less}"
    return (str(error).strip() or type(error).__name__).splitlines()[0]
