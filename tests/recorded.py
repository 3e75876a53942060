"""Synchronous runs whose every update is recorded, and planned faults in them."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import signal
import threading
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

from datapipe.batch import Batch
from tests.clusters import wait_until
from tests.strategies import Wrapped
from xdist.computation import BatchSums
from xdist.strategies import Share
from xdist.strategies.all_reduce import Membership
from xdist.topologies import Outcome, RunPlan, Task, nodes
from xdist.topologies.all_reduce import AllReduceTopology, all_reduce_strategy

THROTTLE_S = 0.4
FREE_STEPS = 2
"""Of a group that is too small, before it waits."""
NUM_READY = "num-ready"


@dataclass(frozen=True)
class Planned:
    """Something that happens once in a run, in the process of a worker."""

    name: str
    worker: int | None
    """None: of any that is on the node."""
    step: int
    """Before it applies this update; `tried`: before it sends anything of it; `sent`: before it
    applies it, and after another one did, to which it has sent its share; `joining`: before it
    joins a group that makes this one (the dead may have sent all of it) or a later one; `save`:
    before it saves such a one; `every_join`: as `joining`, each time.
    """
    act: Callable[[], object]
    when: str = "update"
    node_id: str | None = None


def kills(worker: int, step: int, *, when: str = "update") -> Planned:
    """The worker's process gets SIGKILL."""
    return Planned(f"kill-{worker}-{step}", worker, step, kill_self, when)


def stops(worker: int, step: int) -> Planned:
    """The worker's process gets SIGSTOP."""
    act = partial(signal_self, signal.SIGSTOP)
    return Planned(f"stop-{worker}-{step}", worker, step, act)


def kills_when(event: Path, worker: int, step: int) -> Planned:
    """The worker's process waits for this file, and gets SIGKILL."""
    return Planned(f"kill-{worker}-{step}", worker, step, partial(kill_self_after, event))


def kill_self_after(event: Path) -> None:
    wait_until(lambda: event.exists() or None)
    kill_self()


def kill_self() -> None:
    signal_self(signal.SIGKILL)


def signal_self(number: int) -> None:
    os.kill(os.getpid(), number)


class Recorded(Wrapped):
    """Writes a line for each update that it tries, before any of it is sent, and for each that was
    applied. A group that is smaller than `full_size` makes some steps, and goes on only when who is
    on the way is there, so that the run does not end before.
    """

    def __init__(
        self,
        strategy: Any,
        *,
        number: int,
        directory: Path,
        planned: Sequence[Planned],
        full_size: int,
        num_kills: int,
        num_slow_steps: int,
        slow_until: str,
    ) -> None:
        super().__init__(strategy)
        self._flat = strategy._flat
        self._number = number
        self._directory = directory
        self._planned = [
            plan
            for plan in planned
            if plan.worker in (None, number) and plan.node_id in (None, nodes.here())
        ]
        self._full_size = full_size
        self._num_kills = num_kills
        self._num_slow_steps = num_slow_steps
        self._slow_until = directory / slow_until
        self._path = directory / f"worker-{number}-{os.getpid()}.jsonl"

    def join(self, membership: Membership) -> None:
        self._act("joining", membership.step + 1)
        for plan in self._planned:
            if plan.when == "every_join" and plan.step <= membership.step + 1:
                (self._directory / plan.name).touch()
                plan.act()
        self.strategy.join(membership)
        self._generation = membership.rendezvous.generation
        self._first_step = membership.step + 1
        self._world_size = membership.world_size

    def loss_divisor(self, batch: Batch) -> float:
        rows = batch.sample_weights.numpy() > 0
        ids = batch.sample_ids.numpy()[rows].tolist()
        step = self.strategy.progress.step + 1
        self._write("tried", step, ids=ids)
        self._act("tried", step)
        divisor: float = self.strategy.loss_divisor(batch)
        return divisor

    def update(self, batch: Batch, sums: BatchSums) -> None:
        step = self.strategy.progress.step + 1
        self._act("update", step)
        self._act("sent", step)
        self._die_in_turn()
        if self._world_size < self._full_size and step >= self._first_step + FREE_STEPS:
            wait_until(lambda: num_ready(self._directory) >= self._full_size or None)
        if step <= self._num_slow_steps and not self._slow_until.is_file():
            threading.Event().wait(THROTTLE_S)
        self.strategy.update(batch, sums)
        weights = self._flat.weights.numpy().tobytes()
        self._write("applied", step, weights=hashlib.sha256(weights).hexdigest())

    def save(self, share: Share) -> Any:
        self._act("save", self.strategy.progress.step)
        return self.strategy.save(share)

    def _die_in_turn(self) -> None:
        """Of the deaths of a row, the next one is this worker's, if its number says so: once in
        each group, so that somebody is left who remembers.
        """
        markers = sorted(self._directory.glob("generation-*"))
        number = len(markers)
        marker = self._directory / f"generation-{self._generation:06d}"
        is_due = number < self._num_kills and self._world_size > 1 and marker not in markers
        if is_due and number % self._full_size == self._number:
            marker.touch()
            kill_self()

    def _act(self, when: str, step: int) -> None:
        for plan in self._planned:
            marker = self._directory / plan.name
            is_due = plan.step == step if when in ("tried", "update", "sent") else plan.step <= step
            if plan.when == when and is_due and not marker.exists():
                marker.touch()
                if when == "sent":
                    wait_until(lambda: self._is_applied_elsewhere(step) or None)
                plan.act()

    def _is_applied_elsewhere(self, step: int) -> bool:
        applied = Recording(self._directory).applied
        return any(line["step"] == step for line in applied)

    def _write(self, what: str, step: int, **facts: Any) -> None:
        line = {
            "what": what,
            "step": step,
            "worker": self._number,
            "generation": self._generation,
            "world_size": self._world_size,
            **facts,
        }
        with self._path.open("a") as file:
            file.write(json.dumps(line) + "\n")


def recorded_strategy(
    directory: Path,
    planned: Sequence[Planned],
    full_size: int,
    num_kills: int,
    num_slow_steps: int,
    slow_until: str,
    starts_after: Mapping[int, str],
    *arguments: Any,
    **named: Any,
) -> Any:
    if (event := starts_after.get(named["number"])) is not None:
        wait_until(lambda: (directory / event).exists() or None)
    strategy = all_reduce_strategy(*arguments, **named)
    return Recorded(
        strategy,
        number=named["number"],
        directory=directory,
        planned=planned,
        full_size=full_size,
        num_kills=num_kills,
        num_slow_steps=num_slow_steps,
        slow_until=slow_until,
    )


class Announcing:
    """A topology that leaves a file for every worker that is ready, and one that says how many are
    there.
    """

    def __init__(self, plan: RunPlan, *, directory: Path, make_strategy: Any) -> None:
        self._topology = AllReduceTopology(plan, make_strategy=make_strategy)
        self._directory = directory

    def __getattr__(self, name: str) -> Any:
        return getattr(self._topology, name)

    def receive(self, task: Task, result: Any) -> Outcome:
        outcome = self._topology.receive(task, result)
        if task.action == "start":
            (self._directory / f"ready-{task.number}").touch()
        self._count()
        return outcome

    def replace(self, lost: Task) -> Outcome | None:
        outcome = self._topology.replace(lost)
        self._count()
        return outcome

    def _count(self) -> None:
        states = [hand.state for hand in self._topology._crew]
        partial_file = self._directory / "num-ready.partial"
        partial_file.write_text(str(len(states) - states.count("starting")))
        partial_file.replace(self._directory / NUM_READY)


def num_ready(directory: Path) -> int:
    """Workers that have started, and are not lost."""
    return int((directory / NUM_READY).read_text())


def recorded_topology(
    directory: Path,
    planned: Sequence[Planned] = (),
    *,
    full_size: int = 0,
    num_kills: int = 0,
    num_slow_steps: int = 0,
    slow_until: str = "",
    starts_after: Mapping[int, str] = MappingProxyType({}),
) -> dict[str, Any]:
    """For `topologies=` of a run: records go to `directory`. num_kills: workers that die one after
    the other, each as soon as it trains with others. num_slow_steps: so that others have the time
    to come, at most until the file `slow_until` (as `ready-1`) is there. starts_after: a worker,
    and the file that it waits for before it is ready itself.
    """
    directory.mkdir(exist_ok=True)
    make_strategy = partial(
        recorded_strategy,
        directory,
        planned,
        full_size,
        num_kills,
        num_slow_steps,
        slow_until,
        dict(starts_after),
    )
    make = partial(Announcing, directory=directory, make_strategy=make_strategy)
    return {"all_reduce": make}


class Recording:
    """What the workers of a run wrote."""

    def __init__(self, directory: Path) -> None:
        lines = [
            json.loads(line)
            for path in sorted(directory.glob("worker-*.jsonl"))
            for line in path.read_text().splitlines()
        ]
        self.tried = [line for line in lines if line["what"] == "tried"]
        self.applied = [line for line in lines if line["what"] == "applied"]

    def followed_by(self, later: Recording) -> Recording:
        """That of a run which `later` resumed."""
        both = copy.copy(later)
        after = max(line["generation"] for line in self.tried) + 1
        for name in ("tried", "applied"):
            lines = [
                {**line, "generation": line["generation"] + after} for line in getattr(later, name)
            ]
            setattr(both, name, getattr(self, name) + lines)
        return both

    def steps(self) -> dict[int, tuple[int, int]]:
        """Step -> the generation that made it, and its size."""
        return {line["step"]: (line["generation"], line["world_size"]) for line in self.applied}

    def generations(self) -> dict[int, set[int]]:
        """Step -> the generations that made it."""
        made_by = defaultdict(set)
        for line in self.applied:
            made_by[line["step"]].add(line["generation"])
        return made_by

    def sizes(self) -> list[int]:
        """Sizes of the groups that made steps, in order."""
        made_by = self.steps()
        in_order = dict.fromkeys(made_by[step] for step in sorted(made_by))
        return [size for _, size in in_order]

    def check(self, *, num_samples: int, num_epochs: int | None = None) -> None:
        """Every step was made once, by one generation, with the same weights on all ranks; the
        samples of every epoch came once. num_epochs: of a run that has ended.
        """
        generations = self.generations()
        weights = defaultdict(set)
        for line in self.applied:
            weights[line["step"]].add(line["weights"])
        assert sorted(generations) == list(range(1, max(generations) + 1))
        assert all(len(found) == 1 for found in generations.values())
        assert all(len(found) == 1 for found in weights.values())
        seen = self._seen()
        assert num_epochs is None or len(seen) == num_samples * num_epochs
        for start in range(0, len(seen), num_samples):
            epoch = seen[start : start + num_samples]
            assert len(set(epoch)) == len(epoch)
            assert len(epoch) < num_samples or set(epoch) == set(range(num_samples))

    def _seen(self) -> list[int]:
        """The samples of all steps, in order."""
        made_by = self.steps()
        ids = {step: list[int]() for step in made_by}
        for line in self.tried:
            if line["step"] in made_by and line["generation"] == made_by[line["step"]][0]:
                ids[line["step"]] += line["ids"]
        return [number for step in sorted(ids) for number in ids[step]]
