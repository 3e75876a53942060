"""RunLog: what is told of a run: to Prometheus, its directory, the terminal, the log."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console

from datapipe.errors import CorruptSample, TooManyBadSamples
from xdist.checkpoint import Cut
from xdist.config import PROFILED_STEPS
from xdist.metrics import Metrics
from xdist.profiling import Profile
from xdist.progress import ProgressDisplay
from xdist.publication import Published
from xdist.run_directory import RunDirectory
from xdist.scorer import ScoringRequest
from xdist.topologies import Resize, RunPlan
from xdist.trackers import Trackers, make_trackers
from xdist.worker_messages import WorkerReport

logger = logging.getLogger(__name__)


class RunLog:
    """Metrics are served from `begin` to `close`; the live line is shown while `display` is."""

    def __init__(self, plan: RunPlan, run: RunDirectory, *, start: Cut, console: Console) -> None:
        self._plan = plan
        self._run = run
        self._metrics = Metrics(epoch_samples=plan.order.num_samples, num_workers=plan.num_workers)
        self._metrics.start_from(step=start.step, num_samples=start.num_samples)
        self.display = ProgressDisplay(
            num_places=plan.num_places, num_done=start.num_samples, console=console
        )
        self._trackers = Trackers(
            make_trackers(
                plan.config.trackers,
                run.local,
                name=run.url.rsplit("/", 1)[-1],
                run_id=hashlib.sha256(run.url.encode()).hexdigest()[:16],
                config=plan.config.to_json(),
            )
        )
        self._trackers.go_back(start.num_samples)
        self._put_off: set[str] = set()
        """What a storage has refused since the last checkpoint."""
        self._num_listed = 0
        self._has_profile = False

    def begin(self, address: str, *, kernels: Mapping[str, Any]) -> None:
        """Serve metrics on a port of `address`, this node's. kernels: by node, of a record."""
        with self._run.told_of_refusals():
            place = self._metrics.serve(address, self._run.local)
        logger.info("metrics served address=http://%s/metrics", place)
        self._record("start", kernels=dict(kernels))

    def close(self, *, syncs: bool = True, error: BaseException | None = None) -> None:
        """Nothing is served any more; the run directory is what it is to be in the end. syncs:
        nobody else is at that. error: with which the run ends.
        """
        self._metrics.close()
        self._trackers.close(error)
        try:
            if syncs:
                self._run.sync()
        except OSError as error:  # What has ended the run is to be heard, not this.
            logger.error("run directory %s not brought up to date: %s", self._run.url, error)

    @property
    def step(self) -> int:
        """Updates of the weights, as far as is known."""
        return self._metrics.step

    def resized(self, resize: Resize) -> None:
        self._metrics.resize(resize.num_workers, pause_s=resize.pause_s)
        logger.info(
            "group formed workers=%d generation=%d%s",
            resize.num_workers,
            resize.generation,
            "" if resize.pause_s is None else f" pause_s={resize.pause_s:.2f}",
        )
        self._record("group", **asdict(resize))

    def staffed(self, num_workers: int) -> None:
        """So many train, each by itself."""
        self._metrics.staff(num_workers)

    def reported(self, reports: Sequence[WorkerReport]) -> None:
        """Of a segment of one worker, or of all ranks together."""
        for report in reports:
            if report.profile is not None:
                self._store_profile(report.profile)
        if any(report.num_steps for report in reports):
            record = self._metrics.reports(reports)
            self._write(record)
            self.display.train(record)

    def _store_profile(self, profile: Profile) -> None:
        try:
            self._run.store_profile(profile)
        except OSError as error:
            logger.warning("profile not written: %s", error)
        self._has_profile = True

    def trained(self) -> None:
        """No step follows."""
        if self._plan.config.profile and not self._has_profile:
            logger.warning(
                "no profile: no worker 0 made %d steps; give another --run-dir, or more steps",
                PROFILED_STEPS,
            )

    def corrupt(self, samples: Sequence[CorruptSample]) -> None:
        """List samples that could not be decoded. Raises `TooManyBadSamples`."""
        if not samples:
            return
        listed = self._run.quarantine(samples)
        if len(listed) == self._num_listed:
            return
        self._num_listed = len(listed)
        allowed = self._plan.config.data.bad_samples_allowed(self._plan.order.num_samples)
        logger.warning("samples skipped listed=%d allowed=%d", len(listed), allowed)
        if len(listed) > allowed:
            raise TooManyBadSamples(listed, allowed)

    def published(self, found: Published) -> None:
        self._put_off.clear()
        cut, seconds = found.checkpoint.manifest.cut, found.seconds
        self._metrics.checkpoint(seconds)
        self._metrics.reach(step=cut.step, num_samples=cut.num_samples)
        self._record("checkpoint", cut, seconds=seconds, path=found.checkpoint.url)

    def scored(self, request: ScoringRequest, scores: dict[str, float]) -> None:
        cut, weights = request.checkpoint.manifest.cut, request.weights
        self._metrics.scores(weights, scores)
        self.display.score(weights, scores)
        self._record("evaluation", cut, weights=weights, scores=scores)
        text = " ".join(f"{name}={value:.4f}" for name, value in scores.items())
        logger.info(
            "scored step=%d samples=%d weights=%s %s", cut.step, cut.num_samples, weights, text
        )

    def lost(self, role: str) -> None:
        """An actor of this role is gone, or a link or a storage fails."""
        self._metrics.recovery(role)

    def put_off(self, what: str, why: str) -> None:
        """A storage refuses something, which is tried again; recorded once until it does not."""
        logger.warning("%s, and will try again: %s", what, why)
        self.lost("storage")
        if what not in self._put_off:
            self.recovered(cause=what, reason=why)
        self._put_off.add(what)

    def recovered(self, *, cause: str, reason: str, host: str | None = None) -> None:
        self._record("recovery", cause=cause, reason=reason, host=host)

    def set_back(self, cut: Cut, *, newest: int) -> None:
        """The run goes on from its last checkpoint. newest: the step that it had come to."""
        self._metrics.start_from(step=cut.step, num_samples=cut.num_samples)
        self._trackers.go_back(cut.num_samples)
        said = "run set back to its last checkpoint step=%d updates_lost=%d"
        logger.warning(said, cut.step, newest - cut.step)

    def _record(self, kind: str, cut: Cut | None = None, **values: Any) -> None:
        """cut: what it is about; None: where the run stands."""
        at = self._metrics if cut is None else cut
        place = {"step": at.step, "samples": at.num_samples}
        self._write({"kind": kind, "time": time.time(), **place, **values})

    def _write(self, record: dict[str, Any]) -> None:
        self._run.record(**record)
        self._trackers.record(record)
