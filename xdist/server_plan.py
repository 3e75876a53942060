"""ServerPlan: what a parameter server is built from, and how it is."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
from torch import Tensor

from datapipe.order import Order
from datapipe.position import Position
from xdist.checkpoint import Checkpoint
from xdist.config import TrainConfig
from xdist.errors import UserError
from xdist.flat import Layout
from xdist.ledger import Ledger
from xdist.sequencer import Sequencer
from xdist.state import RangeState, StatisticsState

MOST_THREADS = 4
"""Of a server that reserves no CPUs: more hardly make the memory faster, in which an update is."""


@dataclass(frozen=True)
class ServerPlan:
    """Plain values, so that the actor loads its own range."""

    config: TrainConfig
    most_workers: int
    checkpoint_url: str | None
    """None for a replica, which takes what its primary has: that of the start may be gone."""
    layout: Layout
    start: int
    stop: int
    order: Order
    num_places: int
    save_every_samples: int
    is_first: bool
    """Server 0, or its replica."""

    @property
    def device(self) -> torch.device:
        """Where it keeps its range. Raises `UserError` where torch finds none of its GPUs."""
        num_gpus = self.config.cluster.gpus_per_server
        if num_gpus and not torch.cuda.is_available():
            raise UserError(
                f"cluster.gpus_per_server is {num_gpus}, and torch finds no GPU on the node of a "
                "parameter server; install a torch with CUDA there, or set it to 0"
            )
        return torch.device("cuda" if num_gpus else "cpu")

    @property
    def num_threads(self) -> int:
        """With which it makes its updates."""
        num_cpus = self.config.cluster.cpus_per_server
        return (
            max(1, int(num_cpus)) if num_cpus else min(MOST_THREADS, len(os.sched_getaffinity(0)))
        )

    def ledger(self, position: Position, *, first_token: int) -> Ledger:
        """The ledger of a run that has come so far."""
        return Ledger(
            position,
            order=self.order,
            num_places=self.num_places,
            batch_size=self.config.batch_size,
            first_token=first_token,
        )

    def range_state(self, tensors: dict[str, Tensor]) -> RangeState:
        """The range of the server, with these tensors."""
        device, mask = self.device, self.layout.l2_mask(self.config.optimizer.l2_on)
        return RangeState.from_tensors(
            {name: tensor.to(device) for name, tensor in tensors.items()},
            config=self.config.optimizer,
            start=self.start,
            stop=self.stop,
            l2_mask=mask[self.start : self.stop].to(device, copy=True),
            is_fused=device.type != "cpu",
        )

    def sequencer(self, source: Checkpoint) -> Sequencer:
        """The sequencer of server 0, as the checkpoint has it."""
        cut = source.manifest.cut
        return Sequencer(
            self.config,
            ledger=self.ledger(cut.position, first_token=0),
            statistics=StatisticsState.from_tensors(
                source.read_statistics(),
                config=self.config.optimizer,
                momentum=self.layout.statistics_momentum,
            ),
            version=cut.step,
            save_every_samples=self.save_every_samples,
        )
