"""The driver: submit, wait, observe, publish, recover. One loop for both strategies.

It never waits for one actor in particular: whatever is ready first, a report, a cut, a fault, is
dealt with first.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any, NoReturn, TypeVar

import ray
from ray.exceptions import RayError, RayTaskError
from rich.console import Console

from datapipe.errors import CorruptSample, TooManyBadSamples
from xdist import checkpoint
from xdist.checkpoint import Checkpoint
from xdist.ending import Ending
from xdist.errors import NotEnoughResources, RunDirectoryError, RunFailed
from xdist.failures import LOST, cause_of, fault_of, last_line, reason_of
from xdist.fault_history import FaultHistory
from xdist.interruption import Interruption
from xdist.overdue import Overdue
from xdist.preparation import Preparation
from xdist.publication import Publications
from xdist.run_directory import RunDirectory
from xdist.run_log import RunLog
from xdist.scorer import MAY_PASS, Scorer
from xdist.summary import Summary
from xdist.topologies import Fault, Outcome, Pending, RunPlan, Saved, Task, Topology, nodes
from xdist.topologies.actors import first_ready
from xdist.topologies.all_reduce import AllReduceTopology
from xdist.topologies.push_pull import PushPullTopology

logger = logging.getLogger(__name__)

MakeTopology = Callable[[RunPlan], Topology]
Told = TypeVar("Told", bound=Outcome | None)
TOPOLOGIES: Mapping[str, MakeTopology] = {
    "all_reduce": AllReduceTopology,
    "push_pull": PushPullTopology,
}
GRACE_S = 5.0
"""After a fault, for others to say what they know: the first to notice is seldom the culprit."""
WATCH_EVERY_S = 1.0
"""How often the driver looks at what would not tell."""
PUBLISHED_EVERY_S = 0.02
"""The same, of a checkpoint that is being published."""


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
        interruption: Interruption,
    ) -> None:
        self._interruption = interruption
        self._plan: RunPlan = preparation.plan
        config, every = self._plan.config, self._plan.save_every_samples
        self._ending = Ending(interruption, may_take_s=config.checkpoint.final_save_s)
        self._run = run
        self._latest = start
        self._log = RunLog(self._plan, run, start=start.manifest.cut, console=console)
        self._topology = topology
        self._pending: Pending = {}
        self._scorer = Scorer(preparation.scoring, config, save_every_samples=every)
        self._publications = Publications(run, config, save_every_samples=every)
        self._overdue = Overdue(config.checkpoint.max_age_s)
        self._scores: dict[str, dict[str, float]] = {}
        cluster = config.cluster
        self._faults = FaultHistory(cluster.max_recoveries, window_s=cluster.recovery_window_s)
        self._watched = time.monotonic()
        self._unfit: RayError | None = None
        """Why somebody could not start, since the number of workers has changed."""

    def drive(self) -> Summary:
        """Train, save and score to the end. Raises what a worker raised; when it has saved what it
        can, `RunFailed` after too many faults, `NotEnoughResources`, and `KeyboardInterrupt`.
        """
        started = time.monotonic()
        kernels = {address: asdict(found) for address, found in nodes.kernels().items()}
        self._log.begin(ray.util.get_node_ip_address(), kernels=kernels)
        try:
            with self._log.display:
                self._train()
            self._log.trained()
        finally:
            self._topology.close()
            is_done = self._publications.close(self._ending.left_s)
            self._log.close(syncs=is_done, error=sys.exc_info()[1])
        cut = self._latest.manifest.cut
        return Summary(
            self._run.url, cut.step, cut.num_samples, time.monotonic() - started, self._scores
        )

    def _train(self) -> None:
        self._scorer.begin(self._latest, is_trained=self._is_trained())
        if not self._is_trained():
            self._pending = self._topology.launch(self._latest)
        with self._interruption.waits():
            while not self._is_over():
                self._end_if_due()
                self._handle_next()
        self._ending.raise_failure()

    def _end_if_due(self) -> None:
        """Where the run is to end, or cannot go on: end once what was trained is saved."""
        if not self._ending.is_due:
            return
        is_to_save = self._ending.begin()
        if self._is_trained():
            raise self._ending.cause
        if is_to_save:
            self._publications.hold()
            self._handle(self._apply(self._ask(self._topology.end_soon)))
        self._ending.check(saved=self._latest.manifest.cut.step, newest=self._newest_step)

    @property
    def _newest_step(self) -> int:
        return max(self._log.step, self._topology.newest_step)

    def _is_over(self) -> bool:
        is_saving = self._publications.is_busy or self._topology.is_saving
        if not self._is_trained() or is_saving or any(each.ends for each in self._pending.values()):
            return False
        if not self._scorer.has_room:
            self._pending = {}
            self._topology.close()
            self._scorer.take_room()
        return not self._scorer.has_work

    def _is_trained(self) -> bool:
        """Whether the latest checkpoint is the run's last."""
        return self._plan.ends_with(self._latest.manifest.cut)

    def _handle_next(self) -> None:
        self._scorer.go_on()
        waiting = [*self._pending, *filter(None, [self._scorer.task])]
        timeout_s = PUBLISHED_EVERY_S if self._publications.is_busy else WATCH_EVERY_S
        ready = first_ready(waiting, timeout_s=timeout_s)
        if ready and ready[0] == self._scorer.task:
            self._receive_scores()
        elif ready:
            self._handle(self._receive(ready[0]))
        self._take_published()
        is_at_work = self._pending or not self._is_trained()
        if is_at_work and time.monotonic() - self._watched > WATCH_EVERY_S:
            self._handle(self._apply(self._ask(self._topology.watch)))
            self._overdue.see(is_saving=self._topology.is_saving or self._publications.is_busy)
            self._end_if_overdue()
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
            fault = fault_of(task, error) or self._end_with(error, task)
            self._unfit = error if fault.kind == "unfit" else self._unfit
            return (fault,)
        return self._apply(self._ask(partial(self._topology.receive, task, result)))

    def _ask(self, topology: Callable[[], Told]) -> Told | Outcome:
        """What the topology says; nothing, where it says that the run cannot go on."""
        try:
            return topology()
        except NotEnoughResources as error:
            why = self._unfit and f"; the last one that could not start: {self._unfit}"
            self._ending.fail(NotEnoughResources(f"{error}{why or ''}"))
            return Outcome()

    def _apply(self, outcome: Outcome) -> tuple[Fault, ...]:
        corrupt = (sample for report in outcome.reports for sample in report.corrupt)
        self._list_corrupt([*outcome.corrupt, *corrupt])
        self._log.reported(outcome.reports)
        for saved in outcome.saved:
            self._publish_if_complete(saved)
        if outcome.resize is not None:
            self._log.resized(outcome.resize)
        if outcome.num_workers is not None:
            self._log.staffed(outcome.num_workers)
        if outcome.resize is not None or outcome.num_workers is not None:
            self._unfit = None
        if outcome.ends_at is not None:
            self._ending.saves_at = outcome.ends_at
        self._pending |= outcome.pending
        if outcome.is_lost:
            self._relaunch()
        return outcome.faults

    def _end_with(self, error: RayError, task: Task) -> Fault:
        """The run cannot go on, for what a task has raised: it ends, once what the others have
        trained is saved.
        """
        why = last_line(error)
        self._ending.fail(self._cause_of(error), why)
        return Fault(task, why, "bug")

    def _cause_of(self, error: RayError) -> Exception:
        cause = cause_of(error)
        if isinstance(cause, TooManyBadSamples):
            self._run.quarantine(cause.samples)
        return cause

    def _list_corrupt(self, samples: Sequence[CorruptSample]) -> None:
        try:
            self._log.corrupt(samples)
        except TooManyBadSamples as error:
            self._ending.fail(error)

    def _publish_if_complete(self, saved: Saved) -> None:
        """Publish a checkpoint once all its parts are there."""
        self._list_corrupt(saved.corrupt)
        previous = self._latest.manifest
        self._publications.add(saved.cut, saved.parts, previous=previous, began=saved.began)

    def _take_published(self, *, waits: bool = False) -> bool:
        """Score a checkpoint that is there now, and delete old ones; whether there is one."""
        try:
            published = self._publications.take(waits=waits)
        except RunDirectoryError as error:
            self._put_off("storage failed", str(error))
            return False
        if published is None:
            return False
        self._overdue.saved()
        cut = published.checkpoint.manifest.cut
        if cut.step > self._latest.manifest.cut.step:  # Two may be written side by side.
            self._latest = published.checkpoint
        self._log.published(published)
        self._scorer.add(published.checkpoint, is_last=cut.is_final)
        newest = self._latest.manifest.cut.step
        self._publications.tidy(
            newest=newest,
            scoring=self._scorer.checkpoint_urls,
            then=partial(self._run.sync, is_last=False),
        )
        return True

    def _receive_scores(self) -> None:
        try:
            wanted, scores, corrupt = self._scorer.receive()
        except RayTaskError as error:
            if not isinstance(error.cause, MAY_PASS):
                self._scorer.give_up(last_line(error))
                return self._ending.fail(self._cause_of(error), last_line(error))
            if self._scorer.wants_last:
                self._count_and_record("scoring", str(error.cause))
            self._scorer.put_off(str(error.cause))
        except LOST as error:
            self._count_and_record("scoring", reason_of(error))
        else:
            self._list_corrupt(corrupt)
            if wanted.checkpoint == self._latest:
                self._scores[wanted.weights] = scores
            self._log.scored(wanted, scores)
            self._publications.scored(wanted, scores)

    def _recover(self, first: Fault) -> None:
        """Replace who is gone: one actor where the topology can, everything from the last
        checkpoint otherwise.
        """
        if self._is_trained():
            self._forget(first)
            return
        for fault in self._culprits(first) if first.kind == "complaint" else [first]:
            if fault.kind == "unsaved":
                self._put_off(f"{fault.task.actor} did not save", fault.cause)
                continue
            is_gone = fault.kind in ("lost", "never_ran", "unfit", "bug")
            if is_gone and not self._topology.is_current(fault.task):
                continue
            host = self._topology.host_of(fault.task)
            if fault.kind == "unfit":
                said = "%s could not start, and will try again: %s"
                logger.warning(said, fault.task.actor, fault.cause)
            if is_new := fault.kind not in ("never_ran", "unfit", "bug"):
                self._count_fault(fault.task.actor, fault.cause, host=host)
            replace = partial(self._topology.replace, fault.task)
            replaced = Outcome() if fault.kind == "link" else self._ask(replace)
            if replaced is None:
                self._relaunch()
            else:
                self._handle(self._apply(replaced))
            if is_new:
                cause = f"{fault.task.actor} lost"
                self._log.recovered(cause=cause, reason=fault.cause, host=host)
            if replaced is None:
                break

    def _forget(self, lost: Fault) -> None:
        """The run is complete: wait for nothing any more that a lost actor was to do."""
        if lost.kind == "lost":
            left = self._pending.items()
            self._pending = {ref: task for ref, task in left if not task.is_of_same(lost.task)}

    def _culprits(self, first: Fault) -> list[Fault]:
        """The fault, and those that explain it, first: a healthy actor's complaint is followed by
        the death it is about.
        """
        faults = [first]
        deadline = time.monotonic() + GRACE_S
        while self._pending and not any(fault.kind == "lost" for fault in faults):
            left = max(0.0, deadline - time.monotonic())
            ready = first_ready(list(self._pending), timeout_s=left)
            if not ready:
                break
            faults.extend(self._receive(ready[0]))
        return sorted(faults, key=lambda fault: fault.kind != "lost")

    def _count_fault(self, actor: str, cause: str, *, host: str | None = None) -> None:
        self._log.lost(actor.split()[0])
        try:
            self._faults.add(actor if host is None else f"{actor} on {host}", cause)
        except RunFailed as error:
            self._ending.fail(error)

    def _count_and_record(self, what: str, cause: str) -> None:
        """A fault of what is no actor of the topology, and is tried again."""
        self._count_fault(what, cause)
        self._log.recovered(cause=f"{what} failed", reason=cause)

    def _put_off(self, what: str, why: str) -> None:
        """A storage refuses something, which is tried again."""
        self._overdue.refused(why)
        self._log.put_off(what, why)

    def _end_if_overdue(self) -> None:
        """Rather than train what will not be saved."""
        failure = self._overdue.failure or self._ending.leaving
        if failure is not None and not self._ending.is_due and not self._is_trained():
            self._ending.fail(failure)

    def _relaunch(self) -> None:
        """All actors anew, from the last checkpoint. Nothing that they still say is heard."""
        newest = self._newest_step
        self._topology.close()
        if self._ending.is_due:
            self._end_with_nobody(newest)
        with self._interruption.waits(can_wait=False):
            self._go_back(newest)

    def _end_with_nobody(self, newest: int) -> NoReturn:
        """All that may still come is what was saved before."""
        self._ending.begin()
        while self._publications.is_busy and not self._ending.is_late:
            threading.Event().wait(PUBLISHED_EVERY_S)
            self._take_published()
        self._ending.give_up(saved=self._latest.manifest.cut.step, newest=newest)

    def _go_back(self, newest: int) -> None:
        """To the last checkpoint, from this step."""
        while self._take_published(waits=True):
            pass
        self._publications.clear()
        if self._is_trained():
            self._pending = {}
            return
        self._latest = found = self._found_again()
        self._overdue.saved()
        self._log.set_back(found.manifest.cut, newest=newest)
        if self._ending.is_due:
            raise self._ending.cause
        self._pending = self._topology.launch(found)

    def _found_again(self) -> Checkpoint:
        """The last checkpoint. There is one, as the run began with one: where none is found, the
        storage is away.
        """
        while True:
            try:
                return checkpoint.find_again(self._plan.run_dir)
            except RunDirectoryError as error:
                self._put_off("storage failed", str(error))
                self._end_if_overdue()
                if self._ending.is_due:
                    raise self._ending.cause from error
