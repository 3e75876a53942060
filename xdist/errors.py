"""The exceptions of the training system.

    Exception
    ├── ValueError             a configuration or command line that cannot be: exit code 2
    ├── datapipe.errors.DataError   shards, indexes and samples that cannot be used: exit code 2
    └── XdistError
        ├── UserError          the surroundings do not fit the configuration: exit code 2
        │   ├── NotEnoughResources   the cluster has no room for the workers and servers
        │   ├── RunDirectoryError    the run directory cannot be written, or holds another run
        │   │   └── PartMissing      what a node wrote into it is not there
        │   ├── RunTaken             another process has begun to drive the run
        │   ├── UnknownFormat        another version of this program wrote the checkpoint
        │   └── CheckpointDamaged    a part of a checkpoint is missing or fails its SHA-256
        ├── PeerLost           another worker or a server is gone; this one is healthy
        ├── NotShared          two processes cannot share memory, though both are well
        ├── LeaseLost          this worker was replaced; its late push was refused
        └── RunFailed          more faults than max_recoveries: exit code 1

All of them take their facts as positional arguments, so that they cross process borders (pickle)
undamaged.
"""

from __future__ import annotations


class XdistError(Exception):
    """Anything this package raises on purpose, save for `ValueError`."""


class UserError(XdistError):
    """Something the user can mend; the message says what, where, and what to do next."""


class NotEnoughResources(UserError):
    """The cluster has no room for the workers and servers that were asked for."""


class RunDirectoryError(UserError):
    """The run directory cannot be written, or holds another run."""


class RunTaken(UserError):
    """Another process has begun to drive the run in the same directory."""


class PartMissing(RunDirectoryError):
    """A part of a checkpoint that was written is not in the run directory."""


class UnknownFormat(UserError):
    """Another version of this program wrote the checkpoint."""


class CheckpointDamaged(UserError):
    """A part of a checkpoint is missing or is not what the manifest says."""


class PeerLost(XdistError):
    """Another worker or a server is gone; the one that raises this is healthy.

    unreached: the ranks of its group to which no link is up.
    """

    def __init__(self, message: str, unreached: tuple[int, ...] = ()) -> None:
        super().__init__(message)
        self.unreached = unreached

    @classmethod
    def in_another_term(cls) -> PeerLost:
        """What was asked of the servers before is void: workers join anew."""
        return cls("the servers have changed")


class NotShared(XdistError):
    """Two processes cannot share memory: they are on two nodes, or one is hidden from the other, or
    gone. What they have for each other takes another way.
    """


class LeaseLost(XdistError):
    """The worker's fencing token is not the current one: it was replaced, and nothing of its late
    call was applied.
    """


class RunFailed(XdistError):
    """The run met more faults than its budget allows; holds the history of what failed."""
