"""The driver: submit, wait, observe, publish, recover. One loop for both strategies.

It never waits for one actor in particular: whatever is ready first, a report, a cut, a fault, is
dealt with first.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, NoReturn

import ray
from ray.exceptions import RayError, RayTaskError
from rich.console import Console

from datapipe.errors import CorruptSample, DataError, TooManyBadSamples, UnreadableUrl
from xdist import checkpoint
from xdist.checkpoint import Checkpoint
from xdist.config import PROFILED_STEPS, TrainConfig
from xdist.errors import RunDirectoryError, UserError
from xdist.failures import LOST, fault_of, reason_of
from xdist.fault_history import FaultHistory
from xdist.metrics import Metrics
from xdist.preparation import Preparation, prepare, starting_checkpoint
from xdist.profiling import Profile
from xdist.progress import ProgressDisplay
from xdist.publication import Publications
from xdist.run_directory import CONFIG, RunDirectory
from xdist.scorer import Scorer, ScoringRequest
from xdist.topologies import (
    Fault,
    Outcome,
    Pending,
    Resize,
    RunPlan,
    Saved,
    Topology,
    nodes,
)
from xdist.topologies.all_reduce import AllReduceTopology
from xdist.topologies.push_pull import PushPullTopology
from xdist.worker import WorkerReport

logger = logging.getLogger(__name__)

MakeTopology = Callable[[RunPlan], Topology]
TOPOLOGIES: Mapping[str, MakeTopology] = {
    "all_reduce": AllReduceTopology,
    "push_pull": PushPullTopology,
}
GRACE_S = 5.0
"""After a fault: how long others may take to say what they know of it. The first to notice is
seldom the culprit.
"""
WATCH_EVERY_S = 1.0
"""How often the driver looks at what would not tell."""
PUBLISHED_EVERY_S = 0.02
"""The same, of a checkpoint that is being published."""


@dataclass(frozen=True)
class Summary:
    """How a run ended."""

    run_dir: str
    step: int
    num_samples: int
    seconds: float
    scores: dict[str, dict[str, float]]
    """Weights (average, raw) -> measure -> score of the last checkpoint."""


class Driver:
    """Drives one run from its latest checkpoint to its end."""

    def __init__(
        self,
        preparation: Preparation,
        run: RunDirectory,
        topology: Topology,
        *,
        start: Checkpoint,
        console: Console,
    ) -> None:
        self._plan: RunPlan = preparation.plan
        self._run = run
        self._latest = start
        cut = self._latest.manifest.cut
        self._metrics = Metrics(
            epoch_samples=self._plan.order.num_samples, num_workers=self._plan.num_workers
        )
        self._metrics.start_from(step=cut.step, num_samples=cut.num_samples)
        self._display = ProgressDisplay(
            num_places=self._plan.num_places, num_done=cut.num_samples, console=console
        )
        self._topology = topology
        self._pending: Pending = {}
        self._scorer = Scorer(
            preparation.scoring,
            self._plan.config,
            save_every_samples=self._plan.save_every_samples,
        )
        self._publications = Publications(self._plan.run_dir, self._plan.config)
        self._scores: dict[str, dict[str, float]] = {}
        cluster = self._plan.config.cluster
        self._faults = FaultHistory(cluster.max_recoveries, window_s=cluster.recovery_window_s)
        self._watched = time.monotonic()
        self._num_listed = 0
        self._has_profile = False

    def drive(self) -> Summary:
        """Train, save and score to the end. Raises what a worker raised, and `RunFailed` after too
        many faults.
        """
        started = time.monotonic()
        address = self._metrics.serve(ray.util.get_node_ip_address(), self._run.local)
        logger.info("metrics served address=http://%s/metrics", address)
        kernels = {address: asdict(found) for address, found in nodes.kernels().items()}
        self._record("start", self._metrics.step, self._metrics.num_samples, kernels=kernels)
        try:
            with self._display:
                self._train()
            if self._plan.config.profile and not self._has_profile:
                logger.warning(
                    "no profile: no worker 0 made %d steps; give another --run-dir, or more steps",
                    PROFILED_STEPS,
                )
        finally:
            self._topology.close()
            self._metrics.close()
            self._publications.close()
            self._sync()
        cut = self._latest.manifest.cut
        return Summary(
            self._run.url, cut.step, cut.num_samples, time.monotonic() - started, self._scores
        )

    def _sync(self) -> None:
        try:
            self._run.sync()
        except OSError as error:  # What has ended the run is to be heard, not this.
            logger.error("run directory %s not brought up to date: %s", self._run.url, error)

    def _train(self) -> None:
        if self._is_trained():
            self._scorer.add(self._latest, is_last=True)
        else:
            self._pending = self._topology.launch(self._latest)
        while not self._is_over():
            self._handle_next()

    def _is_over(self) -> bool:
        is_at_work = self._scorer.has_work or self._publications.is_busy
        unfinished = is_at_work or any(task.ends for task in self._pending.values())
        return self._is_trained() and not unfinished

    def _is_trained(self) -> bool:
        """Whether the latest checkpoint is the run's last, by what the configuration says now."""
        cut, config = self._latest.manifest.cut, self._plan.config
        all_places = cut.num_samples >= self._plan.num_places
        is_sync = config.strategy == "all_reduce"
        all_steps = is_sync and config.max_steps is not None and cut.step >= config.max_steps
        return all_places or all_steps

    def _handle_next(self) -> None:
        waiting = list(self._pending)
        if self._scorer.task is not None:
            waiting.append(self._scorer.task)
        timeout_s = PUBLISHED_EVERY_S if self._publications.is_busy else WATCH_EVERY_S
        ready = _first_ready(waiting, timeout_s=timeout_s)
        if ready and ready[0] == self._scorer.task:
            self._receive_scores()
        elif ready:
            self._handle(self._receive(ready[0]))
        self._take_published()
        is_at_work = self._pending or not self._is_trained()
        if is_at_work and time.monotonic() - self._watched > WATCH_EVERY_S:
            self._handle(self._apply(self._topology.watch()))
            self._watched = time.monotonic()

    def _handle(self, faults: Iterable[Fault]) -> None:
        for fault in faults:
            self._recover(fault)

    def _receive(self, ready: ray.ObjectRef[Any]) -> tuple[Fault, ...]:
        """Deal with a finished task; returns what went wrong, with it or by what it says."""
        task = self._pending.pop(ready)
        try:
            result = ray.get(ready)
        except RayError as error:
            fault = fault_of(task, error)
            if fault is None:
                self._raise_cause(error)
            return (fault,)
        return self._apply(self._topology.receive(task, result))

    def _apply(self, outcome: Outcome) -> tuple[Fault, ...]:
        if outcome.corrupt:
            self._quarantine(outcome.corrupt)
        self._observe(outcome.reports)
        for saved in outcome.saved:
            self._publish_if_complete(saved)
        if outcome.resize is not None:
            self._note_resize(outcome.resize)
        self._pending |= outcome.pending
        if outcome.is_lost:
            self._relaunch()
        return outcome.faults

    def _note_resize(self, resize: Resize) -> None:
        self._metrics.resize(resize.num_workers, pause_s=resize.pause_s)
        logger.info(
            "group formed workers=%d generation=%d pause_s=%.2f",
            resize.num_workers,
            resize.generation,
            resize.pause_s,
        )
        self._record("group", self._metrics.step, self._metrics.num_samples, **asdict(resize))

    def _raise_cause(self, error: RayError) -> NoReturn:
        """Raise what the user can mend as itself, and a bug with its own traceback."""
        cause = getattr(error, "cause", error)
        if isinstance(cause, TooManyBadSamples):
            self._run.quarantine(cause.samples)
        if isinstance(cause, (DataError, UserError)):
            raise cause from error
        raise error

    def _observe(self, reports: tuple[WorkerReport, ...]) -> None:
        corrupt = [sample for report in reports for sample in report.corrupt]
        if corrupt:
            self._quarantine(corrupt)
        for report in reports:
            if report.profile is not None:
                self._store_profile(report.profile)
        if any(report.num_steps for report in reports):
            record = self._metrics.reports(reports)
            self._run.record(**record)
            self._display.train(record)

    def _store_profile(self, profile: Profile) -> None:
        try:
            self._run.store_profile(profile)
        except OSError as error:
            logger.warning("profile not written: %s", error)
        self._has_profile = True

    def _quarantine(self, corrupt: Sequence[CorruptSample]) -> None:
        listed = self._run.quarantine(corrupt)
        if len(listed) == self._num_listed:
            return
        self._num_listed = len(listed)
        allowed = self._plan.config.data.bad_samples_allowed(self._plan.order.num_samples)
        logger.warning("samples skipped listed=%d allowed=%d", len(listed), allowed)
        if len(listed) > allowed:
            raise TooManyBadSamples(listed, allowed)

    def _publish_if_complete(self, saved: Saved) -> None:
        """Publish a checkpoint once all its parts are there."""
        if saved.corrupt:
            self._quarantine(saved.corrupt)
        self._publications.add(saved.cut, saved.parts, previous=self._latest.manifest)

    def _take_published(self, *, waits: bool = False) -> None:
        """Score a checkpoint that is there now, and delete old ones."""
        try:
            published = self._publications.take(waits=waits)
        except RunDirectoryError as error:
            self._count_fault("storage", str(error))
            return
        if published is None:
            return
        cut = published.checkpoint.manifest.cut
        if cut.step > self._latest.manifest.cut.step:  # Two may be written side by side.
            self._latest = published.checkpoint
        seconds, path = published.seconds, published.checkpoint.url
        self._metrics.checkpoint(seconds)
        self._metrics.reach(step=cut.step, num_samples=cut.num_samples)
        self._record("checkpoint", cut.step, cut.num_samples, seconds=seconds, path=path)
        self._scorer.add(published.checkpoint, is_last=cut.is_final)
        newest = self._latest.manifest.cut.step
        self._publications.tidy(
            newest=newest,
            scoring=self._scorer.checkpoint_urls,
            then=partial(self._run.sync, is_last=False),
        )

    def _receive_scores(self) -> None:
        try:
            wanted, scores, corrupt = self._scorer.receive()
        except RayTaskError as error:
            if not isinstance(error.cause, UnreadableUrl):
                self._raise_cause(error)
            self._count_fault("scoring", str(error.cause))
        except LOST as error:
            self._count_fault("scoring", reason_of(error))
        else:
            if corrupt:
                self._quarantine(corrupt)
            self._record_scores(wanted, scores)
        self._scorer.go_on()

    def _record_scores(self, scored: ScoringRequest, scores: dict[str, float]) -> None:
        cut = scored.checkpoint.manifest.cut
        weights = scored.weights
        self._metrics.scores(weights, scores)
        self._display.score(scores)
        if scored.checkpoint == self._latest:
            self._scores[weights] = scores
        self._record("evaluation", cut.step, cut.num_samples, weights=weights, scores=scores)
        text = " ".join(f"{name}={value:.4f}" for name, value in scores.items())
        logger.info(
            "scored step=%d samples=%d weights=%s %s", cut.step, cut.num_samples, weights, text
        )

    def _recover(self, first: Fault) -> None:
        """Replace who is gone: one actor where the topology can, everything from the last
        checkpoint otherwise.
        """
        if self._is_trained():
            self._forget(first)
            return
        for fault in self._culprits(first) if first.kind == "complaint" else [first]:
            is_gone = fault.kind in ("lost", "never_ran", "unfit")
            if is_gone and not self._topology.is_current(fault.task):
                continue
            if fault.kind == "unfit":
                said = "%s could not start, and will try again: %s"
                logger.warning(said, fault.task.actor, fault.cause)
            is_unsaved = fault.kind == "unsaved"
            if is_new := fault.kind not in ("never_ran", "unfit"):
                self._count_fault(fault.task.actor, fault.cause)
            is_there = fault.kind in ("link", "unsaved")
            replaced = Outcome() if is_there else self._topology.replace(fault.task)
            if replaced is None:
                self._relaunch()
            else:
                self._handle(self._apply(replaced))
            if is_new:
                self._record(
                    "recovery",
                    self._metrics.step,
                    self._metrics.num_samples,
                    cause=f"{fault.task.actor} {'did not save' if is_unsaved else 'lost'}",
                    reason=fault.cause,
                )
            if replaced is None:
                break

    def _forget(self, lost: Fault) -> None:
        """The run is complete: wait for nothing any more that a lost actor was to do."""
        if lost.kind == "lost":
            whose = (lost.task.actor, lost.task.life)
            self._pending = {
                reference: task
                for reference, task in self._pending.items()
                if (task.actor, task.life) != whose
            }

    def _culprits(self, first: Fault) -> list[Fault]:
        """The fault, and those that explain it, first: a healthy actor's complaint is followed by
        the death it is about.
        """
        faults = [first]
        deadline = time.monotonic() + GRACE_S
        while self._pending and not any(fault.kind == "lost" for fault in faults):
            left = max(0.0, deadline - time.monotonic())
            ready = _first_ready(list(self._pending), timeout_s=left)
            if not ready:
                break
            faults.extend(self._receive(ready[0]))
        return sorted(faults, key=lambda fault: fault.kind != "lost")

    def _count_fault(self, actor: str, cause: str) -> None:
        self._metrics.recovery(actor.split()[0])
        self._faults.add(actor, cause)

    def _relaunch(self) -> None:
        """All actors anew, from the last checkpoint. Nothing that they still say is heard."""
        newest = max(self._metrics.step, self._topology.newest_step)
        self._topology.close()
        self._take_published(waits=True)
        self._publications.clear()
        found = checkpoint.latest(self._plan.run_dir)
        assert found is not None, "the first checkpoint is written before the first launch"
        self._latest = found
        cut, num_lost = found.manifest.cut, newest - found.manifest.cut.step
        self._metrics.start_from(step=cut.step, num_samples=cut.num_samples)
        logger.warning(
            "run set back to its last checkpoint step=%d updates_lost=%d", cut.step, num_lost
        )
        self._pending = self._topology.launch(found)

    def _record(self, kind: str, step: int, num_samples: int, **values: Any) -> None:
        self._run.record(kind=kind, time=time.time(), step=step, samples=num_samples, **values)


def _first_ready(
    waiting: list[ray.ObjectRef[Any]], *, timeout_s: float
) -> list[ray.ObjectRef[Any]]:
    """The first of them that is ready; none after the timeout."""
    if not waiting:  # Ray would not wait for nothing.
        threading.Event().wait(timeout_s)
        return []
    ready, _ = ray.wait(waiting, num_returns=1, timeout=timeout_s)
    return ready


def train(
    config: TrainConfig,
    run: RunDirectory,
    *,
    console: Console,
    topologies: Mapping[str, MakeTopology] = TOPOLOGIES,
    on_other_nodes: Callable[[], object] = lambda: None,
) -> Summary:
    """Run to the end on the cluster that this process is connected to (`connection.connect`).

    `on_other_nodes` is called once on each of them before anything else.
    """
    nodes.on_others(on_other_nodes)
    try:
        return _train(config, run, console=console, topologies=topologies)
    finally:
        if config.cluster.max_world_size is not None:
            nodes.withdraw_request()


def _train(
    config: TrainConfig,
    run: RunDirectory,
    *,
    console: Console,
    topologies: Mapping[str, MakeTopology],
) -> Summary:
    preparation = prepare(config, run, nodes.resources_for(config))
    plan = nodes.placed(preparation.plan)
    run.store(CONFIG, preparation.config.to_json())
    logger.info("configuration %s", json.dumps(plan.config.to_json()))
    start = starting_checkpoint(plan)
    topology = topologies[config.strategy](plan)
    preparation = replace(preparation, plan=plan)
    return Driver(preparation, run, topology, start=start, console=console).drive()
