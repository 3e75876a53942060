"""What one run of bench-sync is asked for, and the sizes that are the same for all.

Without torch: the time that a process takes to its first step is measured.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any, Self

from tests.benchmarks.sync_log import StepLog

IMAGE_SIZE = 71
NUM_CLASSES = 1000
NUM_IMAGES = 512
NUM_WORKERS = 2
BATCH_PER_WORKER = 2
LEARNING_RATE = 0.01
MOMENTUM = 0.9
WEIGHT_DECAY = 1e-5


@dataclass(frozen=True)
class Request:
    """One run of one system, which gets this as JSON, as its only argument."""

    log: str
    """File of the `StepLog`."""
    directory: str
    """Empty directory for checkpoints."""
    data: str
    """Directory of the shards, for who reads some."""
    num_steps: int
    save_every_steps: int
    kill_rank: int
    kill_step: int | None
    cluster: dict[str, Any] = field(default_factory=dict)
    """Fields of `ClusterConfig` that are not at their default."""

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The request that `to_json` wrote."""
        return cls(**json.loads(text))

    def step_log(self, system: str, rank: int) -> StepLog:
        return StepLog(self.log, system, rank, self.kill_rank, self.kill_step)
