"""torchrun and DistributedDataParallel, as PyTorch's tutorial on fault tolerance writes them.

torchrun --standalone --nproc-per-node 2 --max-restarts 3 -m tests.benchmarks.sync_torchrun REQUEST

https://docs.pytorch.org/tutorials/beginner/ddp_series_fault_tolerance.html: every process loads the
snapshot at start, rank 0 saves it now and then. The snapshot holds the optimizer's state too.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from tests.benchmarks.sync_request import Request
from tests.benchmarks.sync_workload import batches_in_memory, make_network, make_sgd


def main(request: Request) -> None:
    """One of the processes."""
    dist.init_process_group("gloo")
    rank = int(os.environ["RANK"])
    log = request.step_log("torchrun", rank)
    snapshot = Path(request.directory) / "snapshot.pt"
    network = make_network()
    optimizer = make_sgd(network)
    step = 0
    if snapshot.exists():
        saved = torch.load(snapshot)
        network.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        step = saved["step"]
    model = DistributedDataParallel(network, gradient_as_bucket_view=True)
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
        if rank == 0 and step % request.save_every_steps == 0:
            state = {
                "model": network.state_dict(),
                "optimizer": optimizer.state_dict(),
                "step": step,
            }
            torch.save(state, snapshot)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Request.from_json(sys.argv[1]))
