"""Publications: checkpoints whose parts are arriving from the owners of the state, in any order."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from xdist import checkpoint
from xdist.checkpoint import Checkpoint, Cut, Manifest, Part
from xdist.config import TrainConfig


@dataclass(frozen=True)
class Published:
    """A checkpoint that is there now."""

    checkpoint: Checkpoint
    seconds: float
    """From the first part to the manifest."""


@dataclass
class _Unfinished:
    cut: Cut
    started: float = field(default_factory=time.monotonic)
    parts: dict[str, Part] = field(default_factory=dict)
    """By their files: a part that is written again is the same one."""


class Publications:
    """Collects parts, and publishes a checkpoint when all of its parts are there."""

    def __init__(self, run_dir: str, config: TrainConfig) -> None:
        self._run_dir = run_dir
        self._config = config
        self._unfinished: dict[int, _Unfinished] = {}
        self._published_before = 0
        """The step of the last one but one."""
        self._published = 0

    def add(self, cut: Cut, parts: tuple[Part, ...], *, previous: Manifest) -> Published | None:
        """Take parts of the checkpoint of `cut`; `previous` is the manifest of an earlier one."""
        unfinished = self._unfinished.setdefault(cut.step, _Unfinished(cut))
        unfinished.parts |= {part.file: part for part in parts}
        manifest = Manifest(
            unfinished.cut,
            previous.layout,
            tuple(unfinished.parts.values()),
            previous.data,
            self._config.to_json(),
            checkpoint.versions(),
        )
        if not manifest.is_complete:
            return None
        del self._unfinished[cut.step]
        published = checkpoint.publish(checkpoint.checkpoint_url(self._run_dir, cut.step), manifest)
        self._abandon(published_now=cut.step)
        return Published(published, time.monotonic() - unfinished.started)

    def _abandon(self, *, published_now: int) -> None:
        """Two later ones are there: the owner of a part that lacks is gone. Who writes for long may
        be overtaken by one.
        """
        self._published_before, self._published = self._published, published_now
        for step in [step for step in self._unfinished if step < self._published_before]:
            del self._unfinished[step]

    def prune(self, *, newest: int, scoring: set[str]) -> None:
        """Delete old checkpoints, but none that is unfinished or, by its URL, among `scoring`."""
        unfinished = {checkpoint.checkpoint_url(self._run_dir, step) for step in self._unfinished}
        keep = self._config.checkpoint.keep
        checkpoint.prune(self._run_dir, newest=newest, keep=keep, spare=scoring | unfinished)

    def clear(self) -> None:
        """Their owners are gone: what is unfinished stays so."""
        self._unfinished.clear()
        self._published_before = self._published = 0
