"""Ray Train's TorchTrainer, as Ray's documentation writes it.

https://docs.ray.io/en/latest/train/getting-started-pytorch.html, and its pages on checkpoints and
on fault tolerance: `prepare_model` wraps the model, rank 0 reports a checkpoint now and then, and
after a failure all workers start again from the last one. It runs on the cluster of RAY_ADDRESS.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import ray.train
import torch
from ray.train.torch import TorchTrainer
from torch.nn import functional as F

from tests.benchmarks.sync_request import NUM_WORKERS, Request
from tests.benchmarks.sync_workload import batches_in_memory, make_network, make_sgd


def train_function(config: dict[str, Any]) -> None:
    """What every worker runs."""
    request = Request(**config)
    rank = ray.train.get_context().get_world_rank()
    log = request.step_log("ray_train", rank)
    network = make_network()
    optimizer = make_sgd(network)
    step = 0
    checkpoint = ray.train.get_checkpoint()
    if checkpoint:
        with checkpoint.as_directory() as directory:
            saved = torch.load(Path(directory) / "checkpoint.pt")
        network.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        step = saved["step"]
    model = ray.train.torch.prepare_model(
        network, parallel_strategy_kwargs={"gradient_as_bucket_view": True}
    )
    batches = batches_in_memory(rank)
    while step < request.num_steps:
        step += 1
        images, labels = next(batches)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), labels)
        log.kill_before(step)
        torch.autograd.backward(loss)
        optimizer.step()
        log.finished(step)
        if step % request.save_every_steps == 0:
            state = {
                "model": network.state_dict(),
                "optimizer": optimizer.state_dict(),
                "step": step,
            }
            report(state, is_saved=rank == 0, loss=loss.item())


def report(state: dict[str, Any], *, is_saved: bool, loss: float) -> None:
    """Report the loss, with a checkpoint where `is_saved`; all ranks must."""
    with tempfile.TemporaryDirectory() as directory:
        checkpoint = None
        if is_saved:
            torch.save(state, Path(directory) / "checkpoint.pt")
            checkpoint = ray.train.Checkpoint.from_directory(directory)
        ray.train.report({"loss": loss}, checkpoint=checkpoint)


def main(request: Request) -> None:
    """Run to the end."""
    trainer = TorchTrainer(
        train_function,
        train_loop_config=vars(request),
        scaling_config=ray.train.ScalingConfig(num_workers=NUM_WORKERS),
        run_config=ray.train.RunConfig(
            name="bench-sync",
            storage_path=request.directory,
            failure_config=ray.train.FailureConfig(max_failures=3),
        ),
    )
    trainer.fit()


if __name__ == "__main__":
    main(Request.from_json(sys.argv[1]))
