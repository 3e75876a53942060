"""Asynchronous training, with real servers, against a literal account of it: plain operations of
torch in one process, to the bit.
"""

from __future__ import annotations

import itertools
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from ray.actor import ActorHandle
from torch import Tensor

from datapipe.batch import Batch
from datapipe.config import DataConfig
from datapipe.order import SampleOrder
from datapipe.plan import leased_batches
from datapipe.position import Span
from tests.listed_batches import make_batch
from tests.local_servers import start_checkpoint
from tests.plain_training import BATCH, OPTIMIZER, PlainTraining
from tests.small_runs import NUM_LABELS, NUM_TRAIN, batches_of, final, records, run, small_config
from tests.strategies import Wrapped
from tests.xdist.updates import same_bits
from xdist import checkpoint, native_update, weights_board
from xdist.checkpoint import Checkpoint, Manifest
from xdist.computation import BatchSums
from xdist.config import TrainConfig
from xdist.flat import FlatModel, even_ranges
from xdist.model_config import ModelConfig
from xdist.server_plan import ServerPlan
from xdist.servers_config import ServersConfig
from xdist.strategies.push_pull import PushPull, Servers
from xdist.topologies import nodes
from xdist.topologies.actors import end, server_on
from xdist.topologies.push_pull import PushPullTopology, push_pull_strategy
from xdist.topologies.remote_server import RemoteServer
from xdist.worker import Worker, initial_model
from xdist.worker_messages import JoinReport, WorkerReport

pytestmark = [pytest.mark.ray, pytest.mark.timeout(180), pytest.mark.usefixtures("cluster")]

# One worker.

NUM_STEPS = 50


class Recorded(Wrapped):
    """Writes the weights that its worker has after each update to the end of a file."""

    def __init__(self, strategy: PushPull, flat: FlatModel, path: Path) -> None:
        super().__init__(strategy)
        self._flat = flat
        self._path = path

    def update(self, batch: Batch, sums: BatchSums) -> None:
        self.strategy.update(batch, sums)
        with self._path.open("ab") as file:
            file.write(self._flat.weights.numpy().tobytes())


def recorded(path: Path, config: TrainConfig, flat: FlatModel, *, number: int) -> Recorded:
    return Recorded(push_pull_strategy(config, flat, number=number), flat, path)


CLIP_NORM = 12.0
"""Some gradients are longer, and some are not."""


@pytest.mark.parametrize(
    ("num_servers", "shared_memory", "clip_norm"),
    [(1, True, None), (2, False, CLIP_NORM), (5, True, CLIP_NORM)],
)
def test_one_worker_equals_plain_training_after_every_step_to_the_bit(
    tmp_path: Path, num_servers: int, shared_memory: bool, clip_norm: float | None
) -> None:
    config = small_config(
        tmp_path,
        strategy="push_pull",
        num_workers=1,
        num_servers=num_servers,
        num_epochs=3,
        max_steps=NUM_STEPS,
        optimizer=replace(OPTIMIZER, clip_norm=clip_norm),
        servers=ServersConfig(shared_memory=shared_memory),
    )
    config = replace(config, model=replace(config.model, dropout=0.3))
    make_strategy = partial(recorded, tmp_path / "weights")
    make = partial(PushPullTopology, make_strategy=make_strategy)
    run(config, tmp_path / "run", topologies={"push_pull": make})
    found = torch.frombuffer(bytearray((tmp_path / "weights").read_bytes()), dtype=torch.float32)
    plain = PlainTraining(config, num_classes=NUM_LABELS)
    places = [
        Span(0, 0, NUM_TRAIN),
        Span(1, 0, NUM_TRAIN),
        Span(2, 0, BATCH * NUM_STEPS - 2 * NUM_TRAIN),
    ]
    batches = batches_of(config, leased_batches(places, batch_size=BATCH))
    num_clipped = 0
    for step, (batch, weights) in enumerate(zip(batches, found.view(NUM_STEPS, -1), strict=True)):
        gradient, statistics = plain.gradient(plain.weights, batch, worker=0, step=step)
        norm = torch.linalg.vector_norm(gradient).item()
        if clip_norm is not None and norm > clip_norm:
            gradient *= clip_norm / norm
            num_clipped += 1
        plain.apply(gradient, statistics)
        assert same_bits(weights, plain.weights), f"step {step + 1}"
    plain.check_equals(final(tmp_path / "run"))
    assert clip_norm is None or 0 < num_clipped < NUM_STEPS
    assert {record["staleness_max"] for record in records(tmp_path / "run", "train")} == {0}


# Two workers.

NUM_CLASSES = 3
CONFIG = TrainConfig(
    data=DataConfig(train="nowhere", image_size=16),
    strategy="push_pull",
    loss="sigmoid",
    model=ModelConfig(num_classes=NUM_CLASSES, width=0.0625, middle_modules=0, dropout=0.3),
    optimizer=OPTIMIZER,
    batch_size=BATCH,
    num_epochs=1,
)
SCRIPT = (0, 1, 1, 0, 1, 1, 1, 0, 0, 1, 0, 0, 0, 1)
"""Which worker pushes next."""
IN_TURN = (0, 1, 0, 2, 1, 0, 0, 3, 0, 2, 1, 0, 0, 3)
"""Staleness of these pushes: those of the other worker since the own one before."""
OVERLAPPED = (0, 1, 2, 3, 2, 2, 1, 6, 4, 3, 2, 2, 1, 6)
"""With an overlap of 1: all pushes since the own one but one before."""
IS_SHARED = native_update.is_available() and weights_board.is_available()
"""Whether workers and servers of one node share memory, unless they are told not to."""


@dataclass(frozen=True)
class RemoteServers:
    """Servers of a run: actors without a driver."""

    start: Checkpoint
    actors: tuple[ActorHandle[Any], ...]
    ranges: tuple[tuple[int, int], ...]

    def membership(self, worker: int) -> Servers:
        return Servers(self.actors, self.ranges, worker=worker)

    def wait_for(self, version: int) -> None:
        """Return when all of them have made this update."""
        ray.get([actor.pull.remote(version) for actor in self.actors])

    def saved(self, directory: Path) -> Checkpoint:
        """The first checkpoint that is due."""
        due: ray.ObjectRef[Any] = self.actors[0].next_cut.remote(0)
        cut = ray.get(due)
        url = checkpoint.checkpoint_url(str(directory), cut.step)
        saved = ray.get([actor.save.remote(cut.step, url) for actor in self.actors])
        parts = tuple(itertools.chain.from_iterable(each.parts for each in saved))
        layout = self.start.manifest.layout
        return checkpoint.publish(url, Manifest(cut, layout, parts, {}, {}, {}))


@contextmanager
def remote_servers(
    config: TrainConfig, directory: Path, *, num_servers: int, save_every: int
) -> Iterator[RemoteServers]:
    """Servers that lead, with the initial weights. save_every: samples."""
    start = start_checkpoint(directory, FlatModel(initial_model(config, num_classes=NUM_CLASSES)))
    ranges = even_ranges(start.manifest.layout.num_weights, num_servers)
    plans = [
        ServerPlan(
            config=config,
            most_workers=2,
            checkpoint_url=start.url,
            layout=start.manifest.layout,
            start=first,
            stop=last,
            order=SampleOrder(1000, block_size=4, blocks_per_pool=2, seed=0),
            num_places=1000,
            save_every_samples=save_every,
            is_first=first == 0,
        )
        for first, last in ranges
    ]
    actors = tuple(server_on(nodes.here(), plan) for plan in plans)
    try:
        remotes = [RemoteServer(actor) for actor in actors]
        begin: Any = actors[0].begin_term
        assert ray.get(begin.remote(1, remotes, 0)) == 0
        yield RemoteServers(start, actors, ranges)
    finally:
        end(actors)


class Leased:
    """A batch for each four places that are leased, until there are enough."""

    def __init__(self, num_batches: int) -> None:
        self._num_left = num_batches

    def join(self, _membership: Any, strategy: PushPull) -> None:
        self._plans = leased_batches(strategy.leases(), batch_size=BATCH)

    def take(self) -> Batch | None:
        if not self._num_left:
            return None
        self._num_left -= 1
        [places] = next(self._plans).spans
        self.taken = make_batch(places.start // BATCH)
        assert self.taken.spans == (places,)
        return self.taken

    def applied(self) -> None:
        pass


class TakesTurns:
    """A worker of this process, which makes one update at a time."""

    def __init__(self, config: TrainConfig, servers: Servers, *, num_turns: int) -> None:
        self._batches = Leased(num_turns)
        self._worker = Worker(
            config,
            number=servers.worker,
            num_classes=NUM_CLASSES,
            make_strategy=partial(self._make_strategy, config),
            make_batches=lambda: self._batches,
        )
        self._worker.start()
        self.joined = self._worker.join(servers)
        self._own_step = 0
        self.staleness: list[int] = []

    def _make_strategy(self, config: TrainConfig, flat: FlatModel) -> PushPull:
        self.weights = flat.weights
        self._strategy = PushPull(config, flat)
        return self._strategy

    @property
    def version(self) -> int:
        """Of its weights, as it says."""
        step = self._strategy.state_step
        assert step is not None
        return step

    def take_turn(self) -> Batch:
        """Make an update; of what batch."""
        self._own_step += 1
        self._train(self._own_step)
        return self._batches.taken

    def finish(self) -> None:
        """See the updates through that are on their way."""
        assert self._train(self._own_step + 1).is_final

    def _train(self, until_step: int) -> WorkerReport:
        report = self._worker.train(until_step)
        assert report.interrupted is None
        self.staleness += Counter(report.staleness).elements()
        return report


@dataclass
class Held:
    """What a worker computes its next gradient with."""

    version: int = 0
    """Of its weights."""
    step: int = 0
    """The last update that it has heard of."""


class DelayedGradients:
    """What two workers make of the weights, each with those that it took last."""

    def __init__(self, config: TrainConfig) -> None:
        self._servers = config.servers
        self.plain = PlainTraining(config, num_classes=NUM_CLASSES)
        self._versions = [self.plain.weights.clone()]
        self._held = (Held(), Held())
        self._on_the_way: tuple[deque[int], ...] = (deque(), deque())
        self.staleness: list[int] = []

    def push(self, worker: int, batch: Batch) -> None:
        held, plain = self._held[worker], self.plain
        weights = self._versions[held.version]
        step = held.step + len(self._on_the_way[worker])
        gradient, statistics = plain.gradient(weights, batch, worker=worker, step=step)
        staleness = plain.version - held.version
        is_scaled = self._servers.scale_by_staleness
        plain.apply(gradient, statistics, rate_divisor=max(1, staleness) if is_scaled else 1)
        self.staleness.append(staleness)
        self._versions.append(plain.weights.clone())
        self._on_the_way[worker].append(plain.version)
        while len(self._on_the_way[worker]) > self._servers.overlap:
            self._receive(worker)

    def finish(self, worker: int) -> None:
        while self._on_the_way[worker]:
            self._receive(worker)

    def _receive(self, worker: int) -> None:
        step = self._on_the_way[worker].popleft()
        self._held[worker].step = self._held[worker].version = step

    def sees(self, worker: int, version: int) -> None:
        """The weights that it took are of this version: the newest, or the one before its push."""
        held, newest = self._held[worker], self.plain.version
        assert version in ((newest - 1, newest) if held.step else (0,))
        held.version = version

    def weights(self, worker: int) -> Tensor:
        return self._versions[self._held[worker].version]


def delayed_gradients(
    config: TrainConfig, directory: Path, *, num_servers: int, sees_later: bool = False
) -> tuple[int, ...]:
    """Train by the script, and compare all weights, bit for bit. The staleness of the pushes."""
    expected = DelayedGradients(config)
    num_shared = num_servers if IS_SHARED and config.servers.shared_memory else 0
    save_every = BATCH * len(SCRIPT)
    with remote_servers(
        config, directory, num_servers=num_servers, save_every=save_every
    ) as remote:
        workers = [
            TakesTurns(config, remote.membership(number), num_turns=SCRIPT.count(number))
            for number in range(2)
        ]
        assert [worker.joined for worker in workers] == [JoinReport(0, None, num_shared)] * 2
        for version, number in enumerate(SCRIPT, start=1):
            worker = workers[number]
            batch = worker.take_turn()
            remote.wait_for(version)
            expected.push(number, batch)
            if sees_later:
                expected.sees(number, worker.version)
            assert same_bits(worker.weights, expected.weights(number)), f"version {version}"
        for number, worker in enumerate(workers):
            worker.finish()
            expected.finish(number)
            if sees_later:
                expected.sees(number, len(SCRIPT))
            assert same_bits(worker.weights, expected.weights(number))
        expected.plain.check_equals(remote.saved(directory))
    for number, worker in enumerate(workers):
        pairs = zip(SCRIPT, expected.staleness, strict=True)
        assert worker.staleness == [staleness for of, staleness in pairs if of == number]
    return tuple(expected.staleness)


@pytest.mark.parametrize(
    ("servers", "staleness"),
    [
        (ServersConfig(), IN_TURN),
        (ServersConfig(shared_memory=False), IN_TURN),
        (ServersConfig(scale_by_staleness=True), IN_TURN),
        (ServersConfig(shared_memory=False, overlap=1), OVERLAPPED),
    ],
    ids=["shared", "sent", "scaled", "overlapped"],
)
def test_two_workers_in_a_given_order_equal_delayed_gradients_to_the_bit(
    tmp_path: Path, servers: ServersConfig, staleness: tuple[int, ...]
) -> None:
    config = replace(CONFIG, servers=servers)
    assert delayed_gradients(config, tmp_path, num_servers=2) == staleness


@pytest.mark.skipif(not IS_SHARED, reason="native/ is not built; pip install . builds it")
def test_with_overlap_and_shared_memory_the_weights_are_of_the_version_that_is_told(
    tmp_path: Path,
) -> None:
    """A worker looks at them while its push is on its way, so they may have it. With one server all
    are of one version.
    """
    config = replace(CONFIG, servers=ServersConfig(overlap=1))
    delayed_gradients(config, tmp_path, num_servers=1, sees_later=True)
