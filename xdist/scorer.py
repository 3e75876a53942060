"""Scorer: which checkpoints of a run are scored, one after the other, in a process beside training;
the last one by as many as have trained.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Collection
from dataclasses import dataclass
from functools import cache
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from datapipe.errors import CorruptSample, MissingShard, UnreadableUrl
from xdist import fork_servers, sizing
from xdist.checkpoint import Checkpoint
from xdist.config import TrainConfig
from xdist.errors import CheckpointDamaged, NotEnoughResources
from xdist.failures import LOST
from xdist.retention import read_scores
from xdist.scoring import ScoringPlan, num_batches, score_part
from xdist.sharded_scoring import placing, score_sharded
from xdist.state import WeightsName, averages
from xdist.topologies import nodes
from xdist.topologies.actors import CONTROL, NO_RETRIES, end

logger = logging.getLogger(__name__)

MAY_PASS = (UnreadableUrl, MissingShard, CheckpointDamaged, OSError)
"""Errors of a task that a storage has caused which is away for a while."""
PUT_OFF_S = 10.0
MOST_TRIES = 3
"""For a checkpoint that is not the run's last."""
PULSE_S = 5.0
"""Between two calls that ask whether what scores runs."""
SILENCE_LIMIT_S = 120.0
"""Without an answer, before it counts as lost: it may have to start, and to import torch."""


@dataclass(frozen=True)
class ScoringRequest:
    """A checkpoint whose score is wanted, on one kind of its weights."""

    checkpoint: Checkpoint
    weights: WeightsName
    is_last: bool = False
    """Whether it is the run's last one."""


class ScoringQueue:
    """Which checkpoint is scored next, on its averaged weights and on the raw ones. The first one
    is being scored; where that takes longer than the next ones take to come, the newest waits and
    the others are passed over, in the log too.
    """

    def __init__(self, config: TrainConfig, *, save_every_samples: int) -> None:
        self._every = config.checkpoint.evaluate_every
        self._save_every_samples = save_every_samples
        self._has_average = averages(config.optimizer)
        self._requests: deque[ScoringRequest] = deque()

    @property
    def first(self) -> ScoringRequest | None:
        return self._requests[0] if self._requests else None

    @property
    def checkpoint_urls(self) -> set[str]:
        """The checkpoints that must not be deleted yet."""
        return {request.checkpoint.url for request in self._requests}

    def add(self, checkpoint: Checkpoint, *, is_last: bool, known: Collection[str] = ()) -> None:
        """Queue a checkpoint if its turn has come; the run's last one in any case. known: the kinds
        of weights whose scores it has.
        """
        number = checkpoint.manifest.cut.num_samples // self._save_every_samples
        if not is_last and (self._every == 0 or number % self._every):
            return
        self._pass_over()
        names: tuple[WeightsName, ...] = ("average", "raw") if self._has_average else ("raw",)
        wanted = [name for name in names if name not in known]
        self._requests.extend(ScoringRequest(checkpoint, name, is_last) for name in wanted)

    def _pass_over(self) -> None:
        """Drop all of those that wait behind the first one."""
        urls = [request.checkpoint.url for request in self._requests]
        for url in dict.fromkeys(url for url in urls if url != urls[0]):
            logger.info("checkpoint passed over, as another is being scored checkpoint=%s", url)
        self._requests = deque(r for r in self._requests if r.checkpoint.url == urls[0])

    def remove_first(self) -> None:
        """It has been scored."""
        self._requests.popleft()


class ScoringProcess:
    """An actor that scores one checkpoint, and answers meanwhile as long as it runs."""

    def score(
        self, plan: ScoringPlan, checkpoint_url: str, weights: WeightsName, num_workers: int
    ) -> tuple[dict[str, float], tuple[CorruptSample, ...], str | None]:
        """The scores of all measures, and the samples that could not be scored. num_workers: that
        count parts of it elsewhere, with what workers have; 0, or where there is no room for them,
        which is told: it is done here.
        """
        tally = why_alone = None
        has_more = plan.config.cluster.gpus_per_worker or min(num_workers, num_batches(plan)) > 1
        if num_workers and has_more:
            try:
                tally = score_sharded(plan, checkpoint_url, weights, num_workers=num_workers)
            except (NotEnoughResources, *LOST) as error:
                why_alone = str(error)
        if tally is None:
            num_cpus = plan.config.evaluation.num_cpus
            tally = score_part(plan, checkpoint_url, weights, num_cpus=num_cpus)
        return tally.scores(), tuple(tally.corrupt), why_alone

    def pulse(self) -> None:
        """On a thread of its own: it runs."""


@cache
def _process_class() -> Any:
    """Made once, or Ray would store each as another class."""
    remote: Any = ray.remote  # Its types do not know concurrency_groups.
    return remote(concurrency_groups={CONTROL: 1})(ScoringProcess)


class Scorer:
    """A process that is lost, or does not answer, is started again; one that could not read what it
    needs, after a while.
    """

    def __init__(
        self, plan: ScoringPlan | None, config: TrainConfig, *, save_every_samples: int
    ) -> None:
        """plan: None scores nothing."""
        self._plan = plan
        self._config = config
        self.has_room = False
        """Whether nobody trains any more."""
        self._asks: dict[str, Any] | None = None
        """What scoring asks of the cluster, once that is known."""
        self._is_asking = False
        """Whether it has asked for that, and not got it yet."""
        self._queue = ScoringQueue(config, save_every_samples=save_every_samples)
        self.task: ray.ObjectRef[Any] | None = None
        """To wait for; None while nothing is scored."""
        self._process: ActorHandle[Any] | None = None
        self._pulse: ray.ObjectRef[Any] | None = None
        self._pulse_sent = 0.0
        self._lacks_room = False
        """Whether it asks for that no more, as it has got none."""
        self._not_before = 0.0
        self._num_put_off = 0

    def add(self, wanted: Checkpoint, *, is_last: bool) -> None:
        """A checkpoint is there, which may have to be scored. is_last: of the run."""
        if self._plan is not None:
            self._queue.add(wanted, is_last=is_last)
            self.go_on()

    def take_room(self) -> None:
        """Nobody trains any more: what is left to be scored is scored on what the workers had. The
        last checkpoint waits for that.
        """
        self.has_room = True
        if self._is_asking:
            self._start_over()

    def begin(self, found: Checkpoint, *, is_trained: bool) -> None:
        """A run begins with this checkpoint: its last one, or one that should have been scored, and
        may not have come to be.
        """
        if is_trained:
            self.add(found, is_last=True)
        elif self._plan is not None and found.manifest.cut.step:
            self._queue.add(found, is_last=False, known=read_scores(found.url))
            self.go_on()

    @property
    def has_work(self) -> bool:
        return self._queue.first is not None

    @property
    def checkpoint_urls(self) -> set[str]:
        """Of the checkpoints that are to be scored yet."""
        return self._queue.checkpoint_urls

    def receive(self) -> tuple[ScoringRequest, dict[str, float], tuple[CorruptSample, ...]]:
        """What the task was asked, what came of it, and the samples that it could not decode.
        Raises what Ray does; then it is to be scored again.
        """
        task, wanted = self.task, self._queue.first
        assert task is not None
        assert wanted is not None
        self.task = self._process = self._pulse = None
        self._is_asking = False
        scores, corrupt, why_alone = ray.get(task)
        if why_alone is not None:
            logger.warning("scored on the driver's node alone: %s", why_alone)
        self._remove_first()
        return wanted, scores, corrupt

    @property
    def wants_last(self) -> bool:
        """Whether the run's last checkpoint is to be scored next: nothing else is left to do."""
        wanted = self._queue.first
        return wanted is not None and wanted.is_last

    def put_off(self, why: str) -> None:
        """The first one could not be scored. After some tries the next one is, unless there can be
        none.
        """
        wanted = self._queue.first
        assert wanted is not None
        self._num_put_off += 1
        self._not_before = time.monotonic() + PUT_OFF_S
        logger.warning("checkpoint %s not scored yet: %s", wanted.checkpoint.url, why)
        if self._num_put_off == MOST_TRIES and not self.wants_last:
            self.give_up(f"it could not be in {MOST_TRIES} tries")

    def give_up(self, why: str) -> None:
        """The first one will not be scored."""
        wanted = self._queue.first
        assert wanted is not None
        logger.error("checkpoint %s is not scored: %s", wanted.checkpoint.url, why)
        self._remove_first()

    def _remove_first(self) -> None:
        self._queue.remove_first()
        self._num_put_off = 0

    def go_on(self) -> None:
        """Begin with the next one, if there is one, and none is being scored."""
        wanted = self._queue.first
        if self.wants_last and not self.has_room:
            return
        if self.task is not None:
            self._check_pulse()
        elif wanted is not None and time.monotonic() >= self._not_before:
            self._start(wanted)

    def _start(self, wanted: ScoringRequest) -> None:
        url = wanted.checkpoint.url
        evaluation = self._config.evaluation
        asks = not self.has_room and bool(evaluation.num_cpus or evaluation.num_gpus)
        self._is_asking = asks and not self._lacks_room
        options = self._options(url) if self._is_asking else self._beside_driver()
        self._process = process = _process_class().options(**NO_RETRIES, **options).remote()
        num_workers = sizing.most_workers(self._config) if self.has_room else 0
        self.task = process.score.remote(self._plan, url, wanted.weights, num_workers)
        self._feel(process)

    def _start_over(self) -> None:
        """It has not started yet, where it was to: the next time it may start elsewhere."""
        assert self._process is not None
        end([self._process])
        self.task = self._process = self._pulse = None
        self._is_asking = False

    def _beside_driver(self) -> dict[str, Any]:
        here = NodeAffinitySchedulingStrategy(nodes.here(), soft=True)
        cluster = self._config.cluster
        return {"num_cpus": 0, "scheduling_strategy": here, **fork_servers.options(cluster)}

    def _options(self, checkpoint_url: str) -> dict[str, Any]:
        assert self._plan is not None, "something is to be scored"
        evaluation = self._config.evaluation
        self._asks = self._asks or placing(
            self._plan,
            checkpoint_url,
            num_cpus=evaluation.num_cpus,
            num_gpus=evaluation.num_gpus,
        )
        return self._asks

    def _feel(self, process: ActorHandle[Any]) -> None:
        pulse: Any = process.pulse.options(concurrency_group=CONTROL)
        self._pulse, self._pulse_sent = pulse.remote(), time.monotonic()

    def _check_pulse(self) -> None:
        """End a process that does not answer: its task fails then."""
        process, pulse = self._process, self._pulse
        silence_s = time.monotonic() - self._pulse_sent
        if process is None or pulse is None or silence_s < PULSE_S:
            return
        if ray.wait([pulse], timeout=0)[0]:
            self._is_asking = False
            self._feel(process)
        elif self._is_asking and silence_s > self._config.cluster.wait_s:
            logger.warning(
                "no room for what scores within %g s (cluster.wait_s): it is on the driver's node "
                "now, without what evaluation.num_cpus and evaluation.num_gpus ask for",
                self._config.cluster.wait_s,
            )
            self._lacks_room = True
            self._start_over()
        elif not self._is_asking and silence_s > SILENCE_LIMIT_S:
            logger.warning("what scores gave no answer for %g s", SILENCE_LIMIT_S)
            self._pulse = None  # It is told once.
            end([process])
