"""AllReduce: synchronous data parallelism. Every rank owns all state and makes the same update.

Gradients are averaged over the ranks, weighted by samples; the batch-norm statistics of the ranks
are averaged unweighted. The all-reduce gives every rank the same bits, so weights stay equal
without being sent.
"""

from __future__ import annotations

import socket
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from datapipe.batch import Batch
from xdist import checkpoint, optim
from xdist.checkpoint import Checkpoint, Part
from xdist.config import TrainConfig
from xdist.errors import PeerLost
from xdist.flat import FlatModel, even_ranges
from xdist.state import WEIGHTS, RangeState, StatisticsState
from xdist.strategies import Progress

COLLECTIVE_TIMEOUT = timedelta(minutes=10)


@dataclass(frozen=True)
class Rendezvous:
    """Where the ranks of one generation of the group meet."""

    host: str
    port: int
    generation: int


def open_store(host: str) -> dist.TCPStore:
    """A rendezvous store in this process, on a free port of `host` alone. It lives in the driver:
    any rank may die.
    """
    listener = socket.create_server((host, 0))
    port = listener.getsockname()[1]
    return dist.TCPStore(
        host, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach()
    )


class AllReduce:
    """The strategy of one rank; construction joins the process group and loads the checkpoint.

    run_dir: where `save` writes. num_classes and the like come with the flat model.
    """

    def __init__(
        self,
        config: TrainConfig,
        flat: FlatModel,
        *,
        rank: int,
        world_size: int,
        rendezvous: Rendezvous,
        checkpoint_url: str,
        run_dir: str,
    ) -> None:
        self._config = config
        self._flat = flat
        self._rank = rank
        self._world_size = world_size
        self._run_dir = run_dir
        self._load(Checkpoint.open(checkpoint_url))
        self._group = _join(rendezvous, rank=rank, world_size=world_size)

    def _load(self, source: Checkpoint) -> None:
        layout, cut = self._flat.layout, source.manifest.cut
        tensors = source.read_range(0, layout.num_weights)
        self._flat.weights.copy_(tensors[WEIGHTS])
        device = self._flat.weights.device
        on_device = {name: tensor.to(device) for name, tensor in tensors.items()}
        self._state = RangeState.from_tensors(
            {**on_device, WEIGHTS: self._flat.weights},
            config=self._config.optimizer,
            start=0,
            stop=layout.num_weights,
            l2_mask=layout.l2_mask(self._config.optimizer.l2_on).to(device),
        )
        self._statistics = StatisticsState.from_tensors(
            {name: tensor.to(device) for name, tensor in source.read_statistics().items()},
            config=self._config.optimizer,
            momentum=layout.statistics_momentum,
        )
        rate = optim.learning_rate(self._config.optimizer, cut.num_samples)
        self._progress = Progress(cut.step, cut.step, cut.num_samples, rate)

    @property
    def progress(self) -> Progress:
        return self._progress

    def update(self, batch: Batch) -> None:
        """Average gradients and statistics over the ranks, and step."""
        num_samples, num_places = self._reduce(batch)
        before = self._progress
        rate = optim.learning_rate(self._config.optimizer, before.num_samples)
        decay = optim.average_decay(
            self._config.optimizer, num_samples=num_places, num_updates=before.step
        )
        self._flat.gradients.div_(max(1, num_samples))
        self._flat.statistics.div_(self._world_size)
        self._state.apply(self._flat.gradients, learning_rate=rate, average_decay=decay)
        self._statistics.apply(self._flat.statistics, average_decay=decay)
        step = before.step + 1
        self._progress = Progress(step, step, before.num_samples + num_places, rate)

    def _reduce(self, batch: Batch) -> tuple[int, int]:
        """Sum over the ranks: gradients times samples, statistics, and the counts (samples,
        places), returned.
        """
        num_places = sum(span.num_samples for span in batch.spans)
        counts = torch.tensor([batch.num_samples, num_places], device=self._flat.weights.device)
        self._flat.gradients.mul_(batch.num_samples)
        try:
            for tensor in (self._flat.gradients, self._flat.statistics, counts):
                dist.all_reduce(tensor, group=self._group)
        except RuntimeError as error:
            raise PeerLost(f"rank {self._rank}: the all-reduce failed: {error}") from error
        samples, places = counts.tolist()
        return samples, places

    def save(self) -> tuple[Part, ...]:
        """Write this rank's even share of the state; rank 0 writes the batch-norm statistics
        too.
        """
        url = checkpoint.checkpoint_url(self._run_dir, self._progress.step)
        start, stop = even_ranges(self._state.stop, self._world_size)[self._rank]
        tensors = {name: tensor[start:stop].cpu() for name, tensor in self._state.tensors().items()}
        part = checkpoint.write_range(url, tensors, start=start, stop=stop)
        if self._rank != 0:
            return (part,)
        return (part, checkpoint.write_statistics(url, self._statistics.tensors()))


def _join(rendezvous: Rendezvous, *, rank: int, world_size: int) -> dist.ProcessGroup | None:
    try:
        store = dist.TCPStore(rendezvous.host, rendezvous.port, is_master=False)
        dist.init_process_group(
            "nccl" if torch.cuda.is_available() else "gloo",
            store=dist.PrefixStore(f"generation-{rendezvous.generation}", store),
            rank=rank,
            world_size=world_size,
            timeout=COLLECTIVE_TIMEOUT,
        )
    except RuntimeError as error:
        raise PeerLost(f"rank {rank}: the group did not come together: {error}") from error
    return dist.group.WORLD
