"""One turn of bench-checkpoint: Ray Train's report of a checkpoint, as its documentation writes it.

https://docs.ray.io/en/latest/train/user-guides/checkpoints.html. One worker; it runs on the cluster
of RAY_ADDRESS.

python -m tests.benchmarks.checkpoint_ray_train DIRECTORY SAVES
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import ray.train
import torch
from ray.train.torch import TorchTrainer

from tests.benchmarks.checkpoint_state import make_model, make_state, update


def train_function(config: dict[str, Any]) -> None:
    """What the worker runs."""
    state = make_state(make_model())
    seconds = []
    for _ in range(config["saves"] + 1):
        update(state)
        began = time.perf_counter()
        with tempfile.TemporaryDirectory() as directory:
            torch.save(state.tensors(), Path(directory) / "checkpoint.pt")
            checkpoint = ray.train.Checkpoint.from_directory(directory)
            ray.train.report({"loss": 0.0}, checkpoint=checkpoint)
        seconds.append(time.perf_counter() - began)
    Path(config["result"]).write_text(json.dumps({"ray_train_s": seconds[1:]}))


def main(directory: Path, saves: int) -> None:
    trainer = TorchTrainer(
        train_function,
        train_loop_config={"saves": saves, "result": str(directory / "result.json")},
        scaling_config=ray.train.ScalingConfig(num_workers=1),
        run_config=ray.train.RunConfig(
            name="bench-checkpoint",
            storage_path=str(directory / "storage"),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=2),
        ),
    )
    trainer.fit()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
