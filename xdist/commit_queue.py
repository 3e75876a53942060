"""CommitQueue: the commits that a server has heard of and not applied, in whatever order they came,
and the versions whose state it is to keep.
"""

from __future__ import annotations

from xdist.sequencer import Commit, PushId


class CommitQueue:
    """They are applied in the order of versions."""

    def __init__(self) -> None:
        self._commits: dict[int, Commit] = {}
        self._to_keep: set[int] = set()

    @property
    def commits(self) -> tuple[Commit, ...]:
        return tuple(self._commits.values())

    @property
    def pushes(self) -> frozenset[PushId]:
        """Those that are to be applied."""
        return frozenset(name for commit in self._commits.values() for name in commit.pushes)

    def add(self, commit: Commit) -> None:
        self._commits[commit.version] = commit

    def keep(self, version: int) -> None:
        """The state at this version is wanted: it is a cut."""
        self._to_keep.add(version)

    def take_kept(self, version: int) -> bool:
        """Whether the state at this version is wanted; true once."""
        is_kept = version in self._to_keep
        self._to_keep.discard(version)
        return is_kept

    def due(self, version: int) -> list[Commit]:
        """Those that follow this version, up to one whose state is wanted."""
        due: list[Commit] = []
        while (commit := self._commits.get(version := version + 1)) is not None:
            due.append(commit)
            if version in self._to_keep:
                break
        return due

    def remove(self, commit: Commit) -> None:
        """It is applied."""
        del self._commits[commit.version]
