"""The asynchronous run of `tests.benchmarks.soak`: workers and parameter servers are killed.

Each worker writes down what it is about to push, and then which version that became. Where it, or a
server, is killed in between there is the first without the second: its push was committed or was
not, and the samples of those that were not have come again.
"""

from __future__ import annotations

import json
import os
import random
import signal
import threading
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from datapipe.batch import Batch
from datapipe.position import Position, Span
from tests.benchmarks.soak import NUM_WORKERS, Arguments
from tests.benchmarks.soak_parts import Ending, Memory, TimeIsUp
from tests.small_runs import NUM_TRAIN, records, run, small_config
from tests.strategies import Wrapped
from xdist.computation import BatchSums
from xdist.config import CheckpointConfig, ClusterConfig
from xdist.servers_config import ServersConfig
from xdist.topologies.push_pull import PushPullTopology, push_pull_strategy

NUM_SERVERS = 2
MEMORY_EVERY_S = 5.0
SECOND_WITHIN_S = 3.0
"""Of a kill of a server, every second time: another server is killed."""


class RecordsPushes(Wrapped):
    """Writes a line for each push that it tries, and for each that is in the weights."""

    def __init__(self, strategy: Any, path: Path) -> None:
        super().__init__(strategy)
        self._path = path

    def update(self, batch: Batch, sums: BatchSums) -> None:
        spans = [[span.epoch, span.start, span.stop] for span in batch.spans]
        self._write({"tried": spans})
        self.strategy.update(batch, sums)
        self._write({"version": self.strategy.progress.step})

    def _write(self, line: dict[str, Any]) -> None:
        with self._path.open("a") as file:
            file.write(json.dumps(line) + "\n")


def recorded_strategy(directory: Path, *arguments: Any, **named: Any) -> Any:
    strategy = push_pull_strategy(*arguments, **named)
    return RecordsPushes(strategy, directory / f"worker-{named['number']}-{os.getpid()}.jsonl")


@dataclass
class Killer:
    """Kills workers and servers now and then, and notes how much memory these have."""

    arguments: Arguments
    topology: PushPullTopology | None = None
    kills: Counter[str] = field(default_factory=Counter)
    memory: Memory = field(default_factory=Memory)
    over: threading.Event = field(default_factory=threading.Event)

    def kill_workers(self) -> None:
        """Kill one of them now and then, until `over`."""
        draws = random.Random(f"{self.arguments.seed} worker")
        while not self.over.wait(self.arguments.every_s * draws.uniform(0.5, 1.5)):
            processes = self._processes("worker")
            if len(processes) == NUM_WORKERS:  # Else somebody is on the way.
                self._kill(draws.choice(processes), "worker")

    def kill_servers(self) -> None:
        """Kill one of them, or its replica, now and then, until `over`; and often one of another
        pair soon after, while the first one's replica is made.
        """
        draws = random.Random(f"{self.arguments.seed} server")
        while not self.over.wait(self.arguments.server_every_s * draws.uniform(0.5, 1.5)):
            struck: set[int] = set()
            for wait_s in (0.0, draws.uniform(0, 2 * SECOND_WITHIN_S)):
                pairs = {number: pair for number, pair in self._pairs() if number not in struck}
                if wait_s > SECOND_WITHIN_S or self.over.wait(wait_s) or not pairs:
                    break
                number = draws.choice(sorted(pairs))
                struck.add(number)
                self._kill(draws.choice(pairs[number]), "server")

    def _kill(self, process: int, role: str) -> None:
        os.kill(process, signal.SIGKILL)
        self.kills[role] += 1

    def _pairs(self) -> list[tuple[int, list[int]]]:
        """The processes of servers that have a replica, and of that."""
        if self.topology is None:
            return []
        servers = self.topology._servers
        pairs = (
            (number, (servers._primaries[number].process, replica.process))
            for number, replica in list(servers._replicas.items())
            if replica.life in servers._attached
        )
        return [
            (number, [process.process_id for process in pair if process is not None])
            for number, pair in pairs
        ]

    def watch_memory(self) -> None:
        """How much all have, until `over`."""
        while not self.over.wait(MEMORY_EVERY_S):
            self.memory.note("driver", [os.getpid()])
            self.memory.note_shared()
            for role in ("worker", "server"):
                if processes := self._processes(role):
                    self.memory.note(role, processes)

    def _processes(self, role: str) -> list[int]:
        if self.topology is None:
            return []
        if role == "server":
            return [process for _, pair in self._pairs() for process in pair]
        hands = [hand for hand in self.topology._workers if hand.has_trained]
        return [hand.process.process_id for hand in hands if hand.process is not None]


def soak(arguments: Arguments, directory: Path) -> dict[str, float]:
    """One run; raises `AssertionError` where anything was lost or came twice."""
    config = replace(
        small_config(directory, strategy="push_pull", num_workers=NUM_WORKERS),
        num_servers=NUM_SERVERS,
        num_epochs=10**6,
        servers=ServersConfig(replicas=1),
        checkpoint=CheckpointConfig(every_samples=400, keep=2, evaluate_every=0),
        cluster=ClusterConfig(max_recoveries=10**6),
        report_every_steps=20,
    )
    recording = directory / "recording"
    recording.mkdir()
    killer = Killer(arguments)

    def make(plan: Any) -> PushPullTopology:
        make_strategy = partial(recorded_strategy, recording)
        killer.topology = PushPullTopology(plan, make_strategy=make_strategy)
        return killer.topology

    deadline = time.monotonic() + 60 * arguments.minutes
    works = (killer.kill_workers, killer.kill_servers, killer.watch_memory)
    threads = [threading.Thread(target=work, daemon=True) for work in works]
    for thread in threads:
        thread.start()
    try:
        topologies = {"push_pull": partial(Ending, make=make, deadline=deadline)}
        run(config, directory / "run", topologies=topologies)
    except TimeIsUp:
        pass
    finally:
        killer.over.set()
        for thread in threads:
            thread.join()
    return {
        **check(recording),
        "workers_killed": killer.kills["worker"],
        "servers_killed": killer.kills["server"],
        "recoveries": len(records(directory / "run", "recovery")),
        **killer.memory.figures(),
    }


def check(recording: Path) -> dict[str, float]:
    """No version was made twice and no sample came twice; the versions that nobody has seen become
    are as many as the pushes whose samples came in no other one.
    """
    made, unseen = pushes_of(recording)
    versions = [version for version, _ in made]
    assert len(set(versions)) == len(versions), "a version was made twice"
    num_unseen = max(versions) - len(versions)
    lost = num_unseen - len(unseen)
    assert lost <= 0, f"{lost} versions are missing, and nobody was killed over them"
    position = Position()
    for _, spans in made:  # Raises where a sample comes twice.
        position = position.with_done(spans, num_samples=NUM_TRAIN)
    num_committed = 0
    for spans in unseen:
        with suppress(ValueError):  # It was not committed: its samples have come again.
            position = position.with_done(spans, num_samples=NUM_TRAIN)
            num_committed += 1
    last_epoch = max(span.epoch for _, spans in made for span in spans)
    assert position.epoch >= last_epoch - 1, f"samples of epoch {position.epoch} never came"
    # When the run ended each worker was at a push, which nobody made again.
    num_gone = num_committed - num_unseen - NUM_WORKERS
    assert num_gone <= 0, f"the samples of {num_gone} pushes were never dealt again"
    return {
        "updates": max(versions),
        "updates_lost": max(0, lost),
        "updates_double": len(versions) - len(set(versions)),
        "updates_unseen": num_unseen,
    }


Spans = list[Span]


def pushes_of(recording: Path) -> tuple[list[tuple[int, Spans]], list[Spans]]:
    """The pushes that were seen to become a version, with that; and the others."""
    made, unseen = [], []
    for path in sorted(recording.glob("worker-*.jsonl")):
        tried: Spans | None = None
        for line in path.read_text().splitlines():
            if not line.endswith("}"):
                continue  # The last line of a worker that was killed may be a part of one.
            what = json.loads(line)
            if "tried" not in what:
                assert tried is not None
                made.append((what["version"], tried))
                tried = None
                continue
            if tried is not None:
                unseen.append(tried)
            tried = [Span(*span) for span in what["tried"]]
        if tried is not None:
            unseen.append(tried)
    return made, unseen
