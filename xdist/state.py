"""RangeState and StatisticsState: the training state that whoever owns weights keeps, and how an
update moves it.

A parameter server owns one `RangeState` of the flat vector; a synchronous worker owns one that
spans all of it. Every operation is elementwise, so the cut into ranges changes no bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Self

from torch import Tensor

from xdist import large_pages
from xdist.config import OptimizerConfig
from xdist.fused_update import FusedUpdate
from xdist.optim import Optimizer, fold, make_optimizer
from xdist.update import Step, Update

WEIGHTS = "weights"
AVERAGE = "average"
STATISTICS = "statistics"
STATISTICS_AVERAGE = "statistics_average"
WeightsName = Literal["average", "raw"]
"""Which weights, and statistics with them, a network is evaluated with."""


@dataclass
class RangeState:
    """Weights [start, stop) of the flat vector, their Polyak average and optimizer slots: (stop -
    start,) float32 each.
    """

    start: int
    stop: int
    weights: Tensor
    """Those after the last update, in the vector that it wrote."""
    average: Tensor | None
    optimizer: Optimizer
    fused_update: FusedUpdate | None = None
    """Makes the updates, if there is one."""

    @classmethod
    def from_tensors(
        cls,
        tensors: dict[str, Tensor],
        *,
        config: OptimizerConfig,
        start: int,
        stop: int,
        l2_mask: Tensor,
        is_fused: bool = False,
    ) -> Self:
        """Take over `tensors` (as `tensors()` names them). What is not there starts anew: slots at
        their initial values, the average at the weights. is_fused: updates are one compiled pass.
        """
        weights = tensors[WEIGHTS]
        optimizer = make_optimizer(config, size=stop - start, l2_mask=l2_mask)
        for name, slot in optimizer.slots.items():
            if name in tensors:
                slot.copy_(tensors[name])
        average = large_pages.copy(tensors.get(AVERAGE, weights)) if averages(config) else None
        fused_update = FusedUpdate(optimizer, weights, average) if is_fused else None
        return cls(start, stop, weights, average, optimizer, fused_update)

    def apply(
        self,
        *steps: Step,
        weights_out: Tensor | None = None,
        bfloat16_out: Tensor | None = None,
        num_threads: int | None = None,
    ) -> None:
        """Updates, one after the other, in one pass. Gradients are means over the samples of an
        update. weights_out, bfloat16_out: as in `Update`, but that a compiled update keeps its own
        weights, and copies them there. num_threads: as in `Optimizer.step`.
        """
        if self.fused_update is not None:
            for step in steps:
                self.fused_update(step)
            for out in (weights_out, bfloat16_out):
                if out is not None:
                    out.copy_(self.weights)
            return
        update = Update(
            self.weights,
            steps,
            weights_out=weights_out,
            bfloat16_out=bfloat16_out,
            average=self.average,
        )
        self.optimizer.step(update, num_threads=num_threads)
        self.weights = update.new_weights

    def tensors(self) -> dict[str, Tensor]:
        """Everything a checkpoint needs of this range, by name; the live tensors, not copies."""
        tensors = {WEIGHTS: self.weights, **self.optimizer.slots}
        return tensors if self.average is None else {**tensors, AVERAGE: self.average}


@dataclass(frozen=True)
class StatisticsState:
    """Running batch-norm statistics and their average: (S,) float32 each."""

    running: Tensor
    average: Tensor | None
    momentum: float

    @classmethod
    def from_tensors(
        cls, tensors: dict[str, Tensor], *, config: OptimizerConfig, momentum: float
    ) -> StatisticsState:
        """Take over `tensors` (as `tensors()` names them)."""
        running = tensors[STATISTICS]
        average = tensors.get(STATISTICS_AVERAGE, running).clone() if averages(config) else None
        return cls(running, average, momentum)

    def apply(self, batch_statistics: Tensor, *, average_decay: float) -> None:
        """Fold the statistics of one update's batch in, with the layers' momentum. (S,) float32."""
        fold(self.running, batch_statistics, share=self.momentum)
        if self.average is not None:
            fold(self.average, self.running, share=1 - average_decay)

    def tensors(self) -> dict[str, Tensor]:
        """Everything a checkpoint needs of the statistics, by name; the live tensors, not
        copies.
        """
        tensors = {STATISTICS: self.running}
        return tensors if self.average is None else {**tensors, STATISTICS_AVERAGE: self.average}


def averages(config: OptimizerConfig) -> bool:
    """Whether the run keeps a Polyak average."""
    return config.average_half_life_samples is not None or config.average_decay is not None


def copies(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors, on the host, detached from what training changes."""
    return {
        name: large_pages.copy(tensor.detach(), device="cpu") for name, tensor in tensors.items()
    }
