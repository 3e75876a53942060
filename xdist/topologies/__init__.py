"""Topologies: which actors exist, who owns the weights, how a lost one is replaced.

A topology submits work to its actors and turns what comes back into outcomes; it never waits for a
result, so that one busy or dead actor does not hold up the rest. The driver waits, decides,
publishes and scores.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

import ray

from datapipe.errors import CorruptSample
from datapipe.order import Order
from xdist import sizing
from xdist.checkpoint import Checkpoint, Cut, Part
from xdist.config import TrainConfig
from xdist.training_data import TrainingData
from xdist.worker_messages import WorkerReport


@dataclass(frozen=True)
class RunPlan:
    """What a topology is built from: the sized configuration, and what follows from the data."""

    config: TrainConfig
    run_dir: str
    data: TrainingData
    num_classes: int
    num_places: int
    """Places of the whole run, from the start of training."""
    save_every_samples: int
    fewest_to_begin: int
    """Workers that must have a place before the run begins."""
    servers_node: str | None = None
    """Node id that the servers are bound to; None lets Ray choose."""

    @property
    def order(self) -> Order:
        """Of the samples of the training set."""
        return self.data.order

    def ends_with(self, cut: Cut) -> bool:
        """Whether this is the run's last state, by what the configuration says now."""
        max_steps, is_sync = self.config.max_steps, self.config.strategy == "all_reduce"
        all_steps = is_sync and max_steps is not None and cut.step >= max_steps
        return all_steps or cut.num_samples >= self.num_places

    def for_workers(self) -> RunPlan:
        """The same, without the names of the labels: they may be many, and each actor gets a
        copy.
        """
        return replace(self, data=replace(self.data, labels=()))

    @property
    def num_workers(self) -> int:
        assert isinstance(self.config.num_workers, int), "sizing.sized resolves auto"
        return self.config.num_workers

    @property
    def most_workers(self) -> int:
        """That the run may grow to."""
        return sizing.most_workers(self.config)

    @property
    def num_servers(self) -> int:
        assert isinstance(self.config.num_servers, int), "sizing.sized resolves auto"
        return self.config.num_servers


@dataclass(frozen=True)
class Task:
    """What was asked of which actor."""

    actor: str
    action: Literal[
        "start",
        "attach",
        "term",
        "join",
        "train",
        "pulse",
        "tell",
        "watch",
        "cut",
        "save",
        "written",
    ]
    number: int
    """Of the worker, or of the server."""
    life: int = 0
    """Which of the actors that had this number, one after the other."""
    cut: Cut | None = None
    """save, written: which one."""
    term: int = 0
    """term, cut: which one of the servers."""
    is_alone: bool = False
    """start: what its node lacks is its own fault; the run goes on without it."""

    @property
    def role(self) -> str:
        """Of the actor: worker, server, link, storage."""
        return self.actor.split()[0]

    def is_of_same(self, actor_of: Task) -> bool:
        """Whether the same actor was asked that."""
        return (self.actor, self.life) == (actor_of.actor, actor_of.life)

    @property
    def ends(self) -> bool:
        """Whether it comes to an end by itself when the run does."""
        return self.action in ("train", "save")


Pending = dict[ray.ObjectRef[Any], Task]


@dataclass(frozen=True)
class Saved:
    """Parts of the checkpoint of a cut that an owner of state wrote."""

    cut: Cut
    parts: tuple[Part, ...]
    began: float | None = None
    """When it was begun to write them, by `time.monotonic`."""
    corrupt: tuple[CorruptSample, ...] = ()
    """Samples before the cut that could not be decoded, where no worker may be left to tell."""


@dataclass(frozen=True)
class Fault:
    """Somebody is gone, or says that somebody else is."""

    task: Task
    cause: str
    kind: Literal["lost", "never_ran", "unfit", "bug", "complaint", "link", "unsaved"]
    """lost: whoever had the task is gone, or is to be ended. never_ran: it was to start on a node
    that had gone. unfit: it could not start, for what its node has or lacks; the others go on. bug:
    what it has raised ends the run, when the others have saved. complaint: it is healthy, and says
    that another one is gone. link: nobody is gone, and they did not reach one another. unsaved:
    nobody is gone, and what is to be saved could not be written; it is tried again.
    """


@dataclass(frozen=True)
class Resize:
    """A group of other workers has begun to train."""

    num_workers: int
    generation: int
    pause_s: float | None
    """Since the last update of those before; None where there was none."""


@dataclass(frozen=True)
class Outcome:
    """What one result means: reports to observe, parts to publish, and the work that follows."""

    reports: tuple[WorkerReport, ...] = ()
    saved: tuple[Saved, ...] = ()
    pending: Pending = field(default_factory=dict)
    faults: tuple[Fault, ...] = ()
    corrupt: tuple[CorruptSample, ...] = ()
    """Samples that could not be decoded; also of those who cannot report any more."""
    resize: Resize | None = None
    num_workers: int | None = None
    """That train by themselves, where that has changed."""
    ends_at: int | None = None
    """The step of the last checkpoint, where the run was to end soon."""
    is_lost: bool = False
    """Nobody has any state any more: only a new launch helps."""


class Topology(Protocol):
    """A set of actors that trains from a checkpoint to the end of the run."""

    def launch(self, start: Checkpoint) -> Pending:
        """Create the actors and submit their first work. Raises `NotEnoughResources`."""

    def receive(self, task: Task, result: Any) -> Outcome:
        """What the result of a task means."""

    def watch(self) -> Outcome:
        """What has become of the actors and their nodes meanwhile; called once a second. Raises
        `NotEnoughResources`.
        """

    def end_soon(self) -> Outcome:
        """Save the state that there is, as soon as that can be, and train no further: an outcome
        tells its step, now or later.
        """

    def is_current(self, task: Task, /) -> bool:
        """Whether the actor of the task is still the one that is counted on."""

    def host_of(self, task: Task, /) -> str | None:
        """The name of the machine on which the actor of the task runs; None before it has started,
        or when it is gone.
        """

    def replace(self, lost: Task, /) -> Outcome | None:
        """Replace a lost actor while the others go on; None where only a new launch helps."""

    @property
    def is_saving(self) -> bool:
        """Whether a cut has been taken whose parts are not all there."""

    @property
    def newest_step(self) -> int:
        """Updates since the start of training, as far as any actor has told since the launch."""

    def close(self) -> None:
        """End all actors."""
