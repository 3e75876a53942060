"""Rehearsal: the first steps of a run, of which nothing stays but what they took.

All that the run needs is found and built, on the cluster that it will have; its data are read, and
its weights updated and saved, in a directory that is deleted afterwards. Nothing is scored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

from rich.table import Table

from xdist.checkpoint import Checkpoint
from xdist.config import TrainConfig
from xdist.errors import UserError
from xdist.preparation import Preparation

NUM_STEPS = 4
"""Of each worker; the first one may take longer, and is not counted."""
MB = 1e6


def shortened(preparation: Preparation) -> Preparation:
    """The same run, of a few steps."""
    plan, config = preparation.plan, preparation.plan.config
    num_updates = NUM_STEPS * (1 if config.strategy == "all_reduce" else plan.num_workers)
    max_steps = min(num_updates, config.max_steps or num_updates)
    few = replace(config, max_steps=max_steps, report_every_steps=1, profile=False, trackers=())
    num_places = min(plan.num_places, num_updates * config.batch_size)
    plan = replace(plan, config=few, num_places=num_places, save_every_samples=plan.num_places)
    return replace(preparation, plan=plan, scoring=None)


@dataclass(frozen=True)
class Estimate:
    """What a run is going to take, if it goes on as it has begun."""

    num_workers: int
    num_weights: int
    num_places: int
    """Samples of the whole run, each as often as it is seen."""
    samples_per_s: float
    """Of all workers."""
    data_wait: float
    """Share of the steps' time that workers waited for samples."""
    worker_mib: float
    gpu_mib: float
    checkpoint_bytes: int
    checkpoint_s: float

    @property
    def total_s(self) -> float:
        return self.num_places / self.samples_per_s

    def table(self) -> Table:
        table = Table(title="this run would take", show_header=False)
        time = timedelta(seconds=round(self.total_s))
        table.add_row("time", f"{time}, at {self.samples_per_s:.1f} samples/s")
        table.add_row("samples", f"{self.num_places:,}")
        table.add_row("workers", str(self.num_workers))
        table.add_row("parameters", f"{self.num_weights:,}")
        table.add_row("waiting for data", f"{self.data_wait:.0%} of a step")
        table.add_row("memory of a worker", f"{self.worker_mib:.0f} MiB")
        if self.gpu_mib:
            table.add_row("memory of a GPU", f"{self.gpu_mib:.0f} MiB")
        size, seconds = self.checkpoint_bytes / MB, self.checkpoint_s
        table.add_row("a checkpoint", f"{size:.0f} MB, written in {seconds:.1f} s")
        return table


def estimate(config: TrainConfig, records: Sequence[dict[str, Any]], saved: Checkpoint) -> Estimate:
    """From what a rehearsal of `config` has left. Raises `UserError` where it was too short."""
    steps = [record for record in records if record["kind"] == "train"]
    if len(steps) < 2 or steps[-1]["samples"] == steps[0]["samples"]:
        raise UserError(
            f"the run has too few steps to tell its speed from: {len(steps)}; give a smaller "
            "--batch-size, or more data"
        )
    first, last = steps[0], steps[-1]
    seconds = last["time"] - first["time"]
    num_places = round(config.num_epochs * last["samples"] / last["epoch"])
    if config.max_steps is not None:
        num_places = min(num_places, config.max_steps * config.batch_size)
    written = [record for record in records if record["kind"] == "checkpoint"]
    parts = saved.manifest.parts
    return Estimate(
        num_workers=last["num_workers"],
        num_weights=saved.manifest.layout.num_weights,
        num_places=num_places,
        samples_per_s=(last["samples"] - first["samples"]) / max(seconds, 1e-9),
        data_wait=sum(step["data_wait_s"] for step in steps[1:])
        / max(sum(step["step_s"] for step in steps[1:]), 1e-9),
        worker_mib=max(step["worker_mib"] for step in steps),
        gpu_mib=max(step["gpu_mib"] for step in steps),
        checkpoint_bytes=sum(part.num_bytes for part in parts),
        checkpoint_s=written[-1]["seconds"],
    )
