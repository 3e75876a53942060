"""Publications: checkpoints whose parts are arriving from the owners of the state, in any order.

What has to do with the storage is done beside the driver's loop, which must notice at once who is
lost, however slow a storage is.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial

from datapipe.errors import UnreadableUrl
from xdist import checkpoint
from xdist.beside import Beside
from xdist.checkpoint import Checkpoint, Cut, Manifest, Part
from xdist.config import TrainConfig
from xdist.errors import PartMissing, RunDirectoryError
from xdist.retention import Retention
from xdist.run_directory import RunDirectory
from xdist.scorer import ScoringRequest

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Published:
    """A checkpoint that is there now."""

    checkpoint: Checkpoint
    seconds: float
    """From when it was begun to write to the manifest."""


@dataclass
class _Unfinished:
    cut: Cut
    started: float
    parts: dict[tuple[int, int], Part] = field(default_factory=dict)
    """By their ranges, (0, 0) that of the statistics: one that is written again takes the place of
    the other, from which it may differ in last bits.
    """


class Publications:
    """Collects parts, and publishes a checkpoint when all of its parts are there."""

    def __init__(self, run: RunDirectory, config: TrainConfig, *, save_every_samples: int) -> None:
        self._run = run
        self._config = config
        self._retention = Retention(
            run.url, config.checkpoint, save_every_samples=save_every_samples
        )
        self._unfinished: dict[int, _Unfinished] = {}
        self._complete: deque[tuple[Manifest, float]] = deque()
        """In the order in which they are published, with the times of their first parts."""
        self._publishing: Future[Checkpoint] | None = None
        """Of the first one."""
        self._tidying: Future[None] | None = None
        self._published_before = 0
        """The step of the last one but one."""
        self._published = 0
        self._done: set[int] = set()
        """Steps of those that have had all their parts."""
        self._gives_up = True
        self._beside = Beside("publications")

    def add(
        self,
        cut: Cut,
        parts: tuple[Part, ...],
        *,
        previous: Manifest,
        began: float | None = None,
    ) -> None:
        """Take parts of the checkpoint of `cut`; `previous` is the manifest of an earlier one. One
        that has had all its parts needs none again. began: when it was begun to write them, by
        `time.monotonic`; None: now.
        """
        if cut.step in self._done:
            return
        started = time.monotonic() if began is None else began
        unfinished = self._unfinished.setdefault(cut.step, _Unfinished(cut, started))
        unfinished.parts |= {(part.start, part.stop): part for part in parts}
        manifest = Manifest(
            unfinished.cut,
            previous.layout,
            tuple(unfinished.parts.values()),
            previous.data,
            self._config.to_json(),
            checkpoint.versions(),
        )
        if manifest.is_complete:
            del self._unfinished[cut.step]
            self._done.add(cut.step)
            self._complete.append((manifest, unfinished.started))
            self._publish_next()

    def _publish_next(self) -> None:
        if self._complete and self._publishing is None:
            manifest, _ = self._complete[0]
            url = checkpoint.checkpoint_url(self._run.url, manifest.cut.step)
            self._publishing = self._beside.submit(partial(self._publish, url, manifest))

    def _publish(self, url: str, manifest: Manifest) -> Checkpoint:
        self._run.check_owned()
        return checkpoint.publish(url, manifest)

    @property
    def is_busy(self) -> bool:
        """Whether one has all its parts, and is not there yet."""
        return bool(self._complete)

    def take(self, *, waits: bool = False) -> Published | None:
        """One that is there now, told once; None where there is none, at once unless it waits.
        Raises `RunDirectoryError` where the storage refused one; that is tried again. One that
        lacks a part is given up (`PartMissing`), where others follow. Raises `RunTaken`.
        """
        if self._tidying is not None and self._tidying.done():
            self._tidying.result()  # A bug is to be heard, and `RunTaken`.
            self._tidying = None
        if self._publishing is None or not (waits or self._publishing.done()):
            return None
        publishing, self._publishing = self._publishing, None
        try:
            published = publishing.result()
        except RunDirectoryError as error:
            manifest, _ = self._complete[0]
            if isinstance(error, PartMissing) and self._gives_up and not manifest.cut.is_final:
                self._complete.popleft()
                self._done.remove(manifest.cut.step)
            self._publish_next()
            raise
        manifest, started = self._complete.popleft()
        self._abandon(published_now=manifest.cut.step)
        self._publish_next()
        return Published(published, time.monotonic() - started)

    def _abandon(self, *, published_now: int) -> None:
        """Two later ones are there: the owner of a part that lacks is gone. Who writes for long may
        be overtaken by one.
        """
        self._published_before, self._published = self._published, published_now
        for step in [step for step in self._unfinished if step < self._published_before]:
            del self._unfinished[step]

    def tidy(self, *, newest: int, scoring: set[str], then: Callable[[], None]) -> None:
        """Delete old checkpoints, but none that is unfinished or, by its URL, among `scoring`; then
        call that. What the storage refuses is done another time.
        """
        unfinished = {*self._unfinished, *(manifest.cut.step for manifest, _ in self._complete)}
        spare = scoring | {checkpoint.checkpoint_url(self._run.url, step) for step in unfinished}

        def tidy() -> None:
            try:
                self._run.check_owned()
                self._retention.prune(newest=newest, spare=spare)
                then()
            except (OSError, UnreadableUrl, RunDirectoryError) as error:
                logger.warning("run directory %s not tidied: %s", self._run.url, error)

        self._tidying = self._beside.submit(tidy)

    def scored(self, request: ScoringRequest, scores: Mapping[str, float]) -> None:
        """Write down beside a checkpoint what it has scored."""
        url, weights = request.checkpoint.url, request.weights

        def write() -> None:
            try:
                self._retention.scored(url, weights, scores)
            except (OSError, UnreadableUrl) as error:
                logger.warning("scores not written checkpoint=%s: %s", url, error)

        self._beside.submit(write)

    def clear(self) -> None:
        """Their owners are gone: what is unfinished stays so."""
        if self._publishing is not None:
            self._publishing.exception()  # Not later: by then there may be another one of its step.
        self._unfinished.clear()
        self._complete.clear()
        self._publishing = None
        self._published_before = self._published = 0
        self._done.clear()

    def hold(self) -> None:
        """None is given up any more: those that are there or come are the run's last."""
        self._gives_up = False

    def close(self, wait_s: float | None = None) -> bool:
        """Return when all that was begun is done, or after so long: whether it is."""
        return self._beside.close(wait_s)
