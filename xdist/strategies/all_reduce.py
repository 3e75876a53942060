"""AllReduce: synchronous data parallelism. Every rank owns all state and makes the same update.

Gradients are summed over the ranks while backward runs, weighted by samples; batch-norm statistics
are averaged over the groups that they were taken of. The all-reduce gives every rank the same bits,
so weights stay equal without being sent. They are sent to a rank that joins, and to one that missed
the last update.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from datapipe.batch import Batch
from datapipe.position import Position
from xdist import checkpoint, optim
from xdist.checkpoint import Checkpoint
from xdist.computation import BatchSums
from xdist.config import TrainConfig
from xdist.flat import FlatModel, even_ranges
from xdist.segments import Dealing
from xdist.share_writer import Piece, ShareWriter, Written
from xdist.state import STATISTICS, WEIGHTS, RangeState, StatisticsState
from xdist.step_phases import Nobody, StepObserver
from xdist.strategies import Progress, Share
from xdist.strategies.group import Group, NoteBoard, Rendezvous, Store, reach_store
from xdist.strategies.reduction import GradientReduction
from xdist.strategies.summed import StopVotes, apply_summed


@dataclass(frozen=True)
class Membership:
    """A rank's place in one generation of the group."""

    rendezvous: Rendezvous
    rank: int
    world_size: int
    dealing: Dealing
    lanes: tuple[int, ...]
    """Of this rank."""
    step: int
    """Updates of the weights that the group starts from."""
    position: Position
    """What is done by then."""
    senders: Mapping[int, int]
    """Ranks that have not the state of that step -> the rank that sends it to them."""
    timeout_s: float
    """For ranks that are not there, and for every collective."""


class AllReduce:
    """The strategy of one rank; it has no peers before `join`."""

    def __init__(
        self,
        config: TrainConfig,
        flat: FlatModel,
        *,
        checkpoint_url: str | None,
        run_dir: str,
        own_address: str,
    ) -> None:
        """checkpoint_url: None where the state will come from another rank. run_dir: where `save`
        writes. own_address: of this node, as its peers know it.
        """
        self._config = config
        self._flat = flat
        self._run_dir = run_dir
        self._own_address = own_address
        self._state_step: int | None = None
        self._load(None if checkpoint_url is None else Checkpoint.open(checkpoint_url))
        self._reduction = GradientReduction(flat, compress=config.compress_gradients == "bfloat16")
        self._writer = ShareWriter()
        self._store: Store | None = None
        self._group: Group | None = None
        self._sums_work: Any = None
        self._stop_requested = threading.Event()
        self._wants_stop = False
        self._peer_wait_s = 0.0
        self._is_computing = False
        self._observer: StepObserver = Nobody()
        self._progress = Progress(own_step=0, step=0, num_samples=0, learning_rate=0.0)

    def _load(self, source: Checkpoint | None) -> None:
        layout, flat, config = self._flat.layout, self._flat, self._config.optimizer
        tensors, statistics = {WEIGHTS: flat.weights}, {STATISTICS: flat.statistics.clone()}
        if source is not None:
            tensors |= source.read_range(0, layout.num_weights)
            statistics |= source.read_statistics()
            self._state_step = source.manifest.cut.step
        flat.weights.copy_(tensors[WEIGHTS])
        self._state = RangeState.from_tensors(
            {**_like(flat.weights, tensors), WEIGHTS: flat.weights},
            config=config,
            start=0,
            stop=layout.num_weights,
            l2_mask=layout.l2_mask(config.l2_on).to(flat.weights),
            is_fused=self._config.compute.fused_optimizer,
        )
        self._statistics = StatisticsState.from_tensors(
            _like(flat.weights, statistics), config=config, momentum=layout.statistics_momentum
        )

    @property
    def progress(self) -> Progress:
        return self._progress

    @property
    def state_step(self) -> int | None:
        return self._state_step

    @property
    def dropout_keys(self) -> tuple[int, ...]:
        """The lanes, or this rank."""
        is_lane = self._config.bn_group == "lane"
        return self._membership.lanes if is_lane else (self._membership.rank,)

    @property
    def seed_step(self) -> int:
        return self._progress.step

    @property
    def wants_stop(self) -> bool:
        return self._wants_stop

    @property
    def peer_wait_s(self) -> float:
        return self._peer_wait_s

    def request_stop(self) -> None:
        self._stop_requested.set()

    def join(self, membership: Membership) -> None:
        """Meet the ranks of this generation, and bring everybody to the same state."""
        self.leave()
        rendezvous = membership.rendezvous
        if self._store is None:
            self._store = reach_store(rendezvous)
        self._group = Group(
            self._store,
            rendezvous,
            rank=membership.rank,
            world_size=membership.world_size,
            own_address=self._own_address,
            device=self._flat.weights.device,
            timeout_s=membership.timeout_s,
        )
        self._exchange_state(self._group, membership)
        self._writer.reserve(self._pieces((membership.rank, membership.world_size)))
        self._membership = membership
        self._votes = StopVotes()
        self._wants_stop = False
        self._stop_requested.clear()
        self._walk = membership.dealing.walk(membership.position)
        num_samples = membership.position.num_seen(membership.dealing.num_samples)
        step, rate = membership.step, self._learning_rate(num_samples)
        self._progress = Progress(step, step, num_samples, rate)

    def _exchange_state(self, group: Group, membership: Membership) -> None:
        """A state that was received in part is none: what there was stays until all has come."""
        tensors = [*self._state.tensors().values(), *self._statistics.tensors().values()]
        sender = membership.senders.get(membership.rank)
        if sender is not None:
            has_state = self._state_step is not None
            buffers = [torch.empty_like(tensor) if has_state else tensor for tensor in tensors]
            group.await_turn()
            for buffer in buffers:
                group.receive(buffer, sender=sender)
            for tensor, buffer in zip(tensors, buffers, strict=True):
                tensor.copy_(buffer)
            self._state_step = membership.step
        assert self._state_step == membership.step
        for receiver, by in membership.senders.items():
            if by == membership.rank:
                group.give_turn(receiver)
                for tensor in tensors:
                    group.send(tensor, to=receiver)

    def _learning_rate(self, num_samples: int) -> float:
        rate = optim.learning_rate(self._config.optimizer, num_samples)
        return rate * self._membership.dealing.batch_size / self._config.batch_size

    def loss_divisor(self, _batch: Batch) -> float:
        """The samples of a full step, so that ranks weigh by theirs."""
        return self._membership.dealing.batch_size

    def begin(self, batch: Batch, sums: BatchSums) -> None:
        """The sums are sent at once, and with them whether somebody wants to stop. What could not
        be decoded is known before: others may finish the step of a worker that is lost in it.
        """
        assert self._group is not None
        self._note_corrupt(batch)
        self._reduction.begin(self._group)
        sums.stop_votes.fill_(float(self._stop_requested.is_set()))
        self._sums_work = self._group.all_reduce(sums.vector)

    def gradient_ready(self, parameter: int) -> None:
        self._reduction.ready(parameter)

    def update(self, batch: Batch, sums: BatchSums) -> None:
        """Sum gradients and statistics over the ranks, and step."""
        assert self._group is not None
        self._observer.enter("all_reduce")
        self._is_computing = True
        self._group.wait_for_own()
        self._is_computing = False
        started = time.perf_counter()
        self._reduction.finish()
        self._group.wait(self._sums_work)
        self._peer_wait_s += time.perf_counter() - started
        self._observer.enter("optimizer")
        self._wants_stop = self._votes.read(sums.stop_votes)
        before, config = self._progress, self._config.optimizer
        num_places = self._walk.next_step()
        rate = self._learning_rate(before.num_samples)
        decay = optim.average_decay(config, num_samples=num_places, num_updates=before.step)
        apply_summed(
            self._flat,
            sums,
            self._state,
            self._statistics,
            divisor=self.loss_divisor(batch),
            clip_norm=config.clip_norm,
            learning_rate=rate,
            average_decay=decay,
        )
        step = self._state_step = before.step + 1
        self._progress = Progress(step, step, before.num_samples + num_places, rate)

    @property
    def is_dropped(self) -> bool:
        return False

    def finish(self) -> None:
        """Nothing is on its way."""

    @property
    def num_shared(self) -> int:
        return 0

    @property
    def lacks_samples(self) -> bool:
        return False

    @property
    def is_sending(self) -> bool:
        """On a GPU, which is behind its host, as long as it has not got so far."""
        return self._is_computing

    def take_staleness(self) -> dict[int, int]:
        return {}

    def _note_corrupt(self, batch: Batch) -> None:
        """What cannot be decoded is not forgotten with the worker that met it."""
        for sample in batch.corrupt:
            assert self._store is not None
            NoteBoard(self._store).write(json.dumps(sample.args))

    def save(self, share: Share) -> None:
        """An even part of the state; with the first one the batch-norm statistics too."""
        step = self._progress.step
        url = checkpoint.checkpoint_url(self._run_dir, step)
        self._writer.save(step, url, self._pieces(share))

    def _pieces(self, share: Share) -> list[Piece]:
        number, num_shares = share
        start, stop = even_ranges(self._state.stop, num_shares)[number]
        tensors = {name: tensor[start:stop] for name, tensor in self._state.tensors().items()}
        pieces = [Piece(checkpoint.range_part(start, stop), start, stop, tensors)]
        if number == 0:
            pieces.append(Piece(checkpoint.STATISTICS_PART, 0, 0, self._statistics.tensors()))
        return pieces

    def written(self, step: int) -> Written:
        return self._writer.written(step)

    def observe(self, observer: StepObserver) -> None:
        self._observer = observer

    def wait_at_most(self, timeout_s: float) -> None:
        if (group := self._group) is not None:
            group.timeout_s = timeout_s

    def abort(self) -> None:
        if (group := self._group) is not None:
            group.abort()

    def leave(self) -> None:
        self._is_computing = False
        self._sums_work = None
        self._reduction.begin(None)
        if self._group is not None:
            self._group.leave()
        self._group = None


def _like(weights: Tensor, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors on the device of the weights, and of their type."""
    return {name: tensor.to(weights) for name, tensor in tensors.items()}
