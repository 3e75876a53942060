"""The driver: submit, wait, observe, publish, recover. One loop for both strategies.

It never waits for one actor in particular: whatever is ready first, a report, a cut, a fault, is
dealt with first.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import ray
from ray.exceptions import (
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayActorError,
    RayTaskError,
    WorkerCrashedError,
)
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from rich.console import Console

from datapipe.errors import CorruptSample, DataError, TooManyBadSamples
from xdist import checkpoint, scoring
from xdist.checkpoint import Checkpoint, Cut, Manifest, Part
from xdist.config import TrainConfig
from xdist.errors import LeaseLost, PeerLost, RunFailed, UserError
from xdist.metrics import Metrics
from xdist.preparation import Preparation, prepare
from xdist.progress import ProgressDisplay
from xdist.run_directory import CONFIG, RunDirectory
from xdist.scoring import WeightsName
from xdist.state import averages
from xdist.topologies import Outcome, Pending, RunPlan, Saved, Task, Topology, nodes
from xdist.topologies.all_reduce import AllReduceTopology
from xdist.topologies.push_pull import PushPullTopology
from xdist.worker import WorkerReport

logger = logging.getLogger(__name__)

MakeTopology = Callable[[RunPlan], Topology]
TOPOLOGIES: Mapping[str, MakeTopology] = {
    "all_reduce": AllReduceTopology,
    "push_pull": PushPullTopology,
}
LOST = (
    RayActorError,
    ObjectLostError,
    NodeDiedError,
    WorkerCrashedError,
    OutOfMemoryError,
)
GRACE_S = 5.0
"""After a fault: how long others may take to say what they know of it. The first to notice is
seldom the culprit.
"""


@dataclass(frozen=True)
class Summary:
    """How a run ended."""

    run_dir: str
    step: int
    num_samples: int
    seconds: float
    scores: dict[str, dict[str, float]]
    """Weights (average, raw) -> measure -> score of the last checkpoint."""


@dataclass(frozen=True)
class Fault:
    """Somebody is gone, or says that somebody else is."""

    task: Task
    cause: str
    is_culprit: bool
    """False: the one that reports it is healthy."""


@dataclass
class _Publication:
    """Parts of a checkpoint that are there so far."""

    cut: Cut
    started: float
    parts: list[Part] = field(default_factory=list)


class Driver:
    """Drives one run from its latest checkpoint to its end."""

    def __init__(
        self, preparation: Preparation, run: RunDirectory, topology: Topology, *, console: Console
    ) -> None:
        self._plan: RunPlan = preparation.plan
        self._scoring = preparation.scoring
        self._run = run
        self._latest: Checkpoint = preparation.start
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
        self._scorings: dict[ray.ObjectRef[Any], tuple[Checkpoint, WeightsName]] = {}
        self._publications: dict[int, _Publication] = {}
        self._num_published = 0
        self._scores: dict[str, dict[str, float]] = {}
        self._faults: list[str] = []

    def drive(self) -> Summary:
        """Train, save and score to the end. Raises what a worker raised, and `RunFailed` after too
        many faults.
        """
        started = time.monotonic()
        address = self._metrics.serve(ray.util.get_node_ip_address(), self._run.local)
        logger.info("metrics served address=http://%s/metrics", address)
        self._record("start", self._metrics.step, self._metrics.num_samples)
        try:
            with self._display:
                self._train()
        finally:
            self._topology.close()
            self._metrics.close()
            self._run.sync()
        cut = self._latest.manifest.cut
        return Summary(
            self._run.url, cut.step, cut.num_samples, time.monotonic() - started, self._scores
        )

    def _train(self) -> None:
        if self._is_trained():
            self._submit_scoring(self._latest, is_last=True)
        else:
            self._pending = self._topology.launch(self._latest)
        while not self._is_over():
            self._handle_next()

    def _is_over(self) -> bool:
        unfinished = self._scorings or any(task.ends for task in self._pending.values())
        return self._is_trained() and not unfinished

    def _is_trained(self) -> bool:
        """Whether the latest checkpoint is the run's last, by what the configuration says now."""
        cut, config = self._latest.manifest.cut, self._plan.config
        all_places = cut.num_samples >= self._plan.num_places
        is_sync = config.strategy == "all_reduce"
        all_steps = is_sync and config.max_steps is not None and cut.step >= config.max_steps
        return all_places or all_steps

    def _handle_next(self) -> None:
        [ready], _ = ray.wait([*self._pending, *self._scorings], num_returns=1)
        if ready in self._scorings:
            self._receive_scores(ready)
        elif (fault := self._receive(ready)) is not None:
            self._recover(fault)

    def _receive(self, ready: ray.ObjectRef[Any]) -> Fault | None:
        """Deal with a finished task, or return what went wrong with it."""
        task = self._pending.pop(ready)
        outcome = self._collect(ready, task)
        if isinstance(outcome, Fault):
            return outcome
        self._observe(outcome.reports)
        for saved in outcome.saved:
            self._publish_if_complete(saved)
        self._pending |= outcome.pending
        return None

    def _collect(self, ready: ray.ObjectRef[Any], task: Task) -> Outcome | Fault:
        """The outcome of a finished task. An exception in the code is no fault: it is raised, as
        itself.
        """
        try:
            return self._topology.receive(task, ray.get(ready))
        except RayTaskError as error:
            if isinstance(error.cause, (PeerLost, LeaseLost)):
                return Fault(task, str(error.cause), is_culprit=False)
            if isinstance(error.cause, TooManyBadSamples):
                self._run.quarantine(error.cause.samples)
            if isinstance(error.cause, (DataError, UserError)):
                raise error.cause from error
            raise
        except LOST as error:
            if isinstance(error, RayActorError) and error.actor_init_failed:
                raise
            return Fault(task, _first_line(error), is_culprit=True)

    def _observe(self, reports: tuple[WorkerReport, ...]) -> None:
        corrupt = [sample for report in reports for sample in report.corrupt]
        if corrupt:
            self._quarantine(corrupt)
        if any(report.num_steps for report in reports):
            record = self._metrics.reports(reports)
            self._run.record(**record)
            self._display.train(record)

    def _quarantine(self, corrupt: Sequence[CorruptSample]) -> None:
        listed = self._run.quarantine(corrupt)
        allowed = self._plan.config.data.max_bad_samples
        logger.warning("samples skipped listed=%d allowed=%d", len(listed), allowed)
        if len(listed) > allowed:
            raise TooManyBadSamples(listed, allowed)

    def _publish_if_complete(self, saved: Saved) -> None:
        """Publish a checkpoint once all its parts are there; then score it, and delete old ones."""
        publication = self._publications.setdefault(
            saved.cut.step, _Publication(saved.cut, time.monotonic())
        )
        publication.parts.extend(saved.parts)
        previous = self._latest.manifest
        manifest = Manifest(
            saved.cut,
            previous.layout,
            tuple(publication.parts),
            previous.data,
            self._plan.config.to_json(),
            checkpoint.versions(),
        )
        if not manifest.is_complete:
            return
        del self._publications[saved.cut.step]
        url = checkpoint.checkpoint_url(self._plan.run_dir, saved.cut.step)
        published = checkpoint.publish(url, manifest)
        if saved.cut.step > previous.cut.step:  # Parts of two cuts may be written side by side.
            self._latest = published
        self._num_published += 1
        seconds = time.monotonic() - publication.started
        self._metrics.checkpoint(seconds)
        cut = saved.cut
        self._record("checkpoint", cut.step, cut.num_samples, seconds=seconds, path=url)
        self._submit_scoring(published, is_last=saved.cut.is_final)
        unpublished = [
            checkpoint.checkpoint_url(self._plan.run_dir, step) for step in self._publications
        ]
        spare = {*unpublished, *(scored.url for scored, _ in self._scorings.values())}
        checkpoint.prune(self._plan.run_dir, keep=self._plan.config.checkpoint.keep, spare=spare)
        self._run.sync()

    def _submit_scoring(self, scored: Checkpoint, *, is_last: bool) -> None:
        every = self._plan.config.checkpoint.evaluate_every
        is_due = every and self._num_published % every == 0
        if self._scoring is None or not (is_due or is_last):
            return
        best: WeightsName = "average" if averages(self._plan.config.optimizer) else "raw"
        names: tuple[WeightsName, ...] = (
            ("average", "raw") if is_last and best == "average" else (best,)
        )
        here = NodeAffinitySchedulingStrategy(nodes.here(), soft=True)
        task = ray.remote(scoring.score).options(num_cpus=0, scheduling_strategy=here)
        for name in names:
            self._scorings[task.remote(self._scoring, scored.url, name)] = (scored, name)

    def _receive_scores(self, ready: ray.ObjectRef[Any]) -> None:
        scored, weights = self._scorings.pop(ready)
        try:
            scores, corrupt = ray.get(ready)
        except RayTaskError as error:
            raise (error.cause if isinstance(error.cause, DataError) else error) from error
        except LOST as error:
            logger.warning("not scored checkpoint=%s cause=%s", scored.url, _first_line(error))
            return
        if corrupt:
            self._quarantine(corrupt)
        cut = scored.manifest.cut
        self._metrics.scores(weights, scores)
        self._display.score(scores)
        if scored == self._latest:
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
            return
        for fault in self._culprits(first):
            self._count_fault(fault)
            replacement = self._topology.replace(fault.task)
            if replacement is None:
                self._relaunch()
                break
            self._pending |= replacement
        self._metrics.recovery(first.task.actor.split()[0])
        cause = f"{first.task.actor} lost"
        self._record("recovery", self._metrics.step, self._metrics.num_samples, cause=cause)

    def _culprits(self, first: Fault) -> list[Fault]:
        """The fault, and those that explain it, first: a healthy actor's complaint is followed by
        the death it is about.
        """
        faults = [first]
        deadline = time.monotonic() + GRACE_S
        while self._pending and not any(fault.is_culprit for fault in faults):
            left = max(0.0, deadline - time.monotonic())
            ready, _ = ray.wait(list(self._pending), num_returns=1, timeout=left)
            if not ready:
                break
            fault = self._receive(ready[0])
            if fault is not None:
                faults.append(fault)
        return sorted(faults, key=lambda fault: not fault.is_culprit)

    def _count_fault(self, fault: Fault) -> None:
        self._faults.append(f"{fault.task.actor}: {fault.cause}")
        allowed = self._plan.config.cluster.max_recoveries
        logger.warning("%s lost recoveries=%d allowed=%d cause=%s",
                       fault.task.actor, len(self._faults), allowed, fault.cause)  # fmt: skip
        if len(self._faults) > allowed:
            history = "\n  ".join(self._faults)
            raise RunFailed(
                f"{len(self._faults)} faults, cluster.max_recoveries allows {allowed}:\n  {history}"
                "\nthe same command resumes from the last checkpoint"
            )

    def _relaunch(self) -> None:
        """All actors anew, from the last checkpoint. Nothing that they still say is heard."""
        self._topology.close()
        self._publications.clear()
        found = checkpoint.latest(self._plan.run_dir)
        assert found is not None, "the first checkpoint is written before the first launch"
        self._latest = found
        cut = found.manifest.cut
        self._metrics.start_from(step=cut.step, num_samples=cut.num_samples)
        logger.warning("run set back to its last checkpoint step=%d", cut.step)
        self._pending = self._topology.launch(found)

    def _record(self, kind: str, step: int, num_samples: int, **values: Any) -> None:
        self._run.record(kind=kind, time=time.time(), step=step, samples=num_samples, **values)


def connect() -> None:
    """Connect to the cluster: that of RAY_ADDRESS, a local one, or a new one of this process."""
    if ray.is_initialized():
        return
    try:
        ray.init(logging_level=logging.WARNING)
    except ConnectionError as error:
        raise UserError(f"no Ray cluster: {error}; start one with `ray start --head`") from error


def train(
    config: TrainConfig,
    run: RunDirectory,
    *,
    console: Console,
    topologies: Mapping[str, MakeTopology] = TOPOLOGIES,
    on_other_nodes: Callable[[], object] = lambda: None,
) -> Summary:
    """Run to the end on the cluster that this process is connected to (`connect`).

    `on_other_nodes` is called once on each of them before anything else.
    """
    nodes.on_others(on_other_nodes)
    preparation = prepare(config, run, ray.cluster_resources())
    preparation = replace(preparation, plan=nodes.placed(preparation.plan))
    run.store(CONFIG, preparation.plan.config.to_json())
    topology = topologies[config.strategy](preparation.plan)
    return Driver(preparation, run, topology, console=console).drive()


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
