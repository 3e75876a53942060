"""Two ranks on two hosts whose link is taken down: python -m tests.parted_ranks DIRECTORY

Drives the cluster from the head's host. Makes the file `joined` when the group stands, waits for
`parted`, and writes what it then found to `found`.
"""

from __future__ import annotations

import json
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import ray
import torch
import torch.distributed as dist
from ray.exceptions import ActorDiedError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from tests.clusters import is_alive, wait_until

STORE_PORT = 23456


class Rank:
    def join(self, ip: str, rank: int) -> float:
        store = dist.TCPStore(ip, STORE_PORT, 2, is_master=rank == 0)
        limit = timedelta(seconds=2)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=limit)
        return self.sum()

    def sum(self) -> float:
        ones = torch.ones(1)
        dist.all_reduce(ones)
        return ones.item()


def main(directory: Path) -> None:
    ray.init(log_to_driver=False)
    here = ray.get_runtime_context().get_node_id()
    [ip] = [node["NodeManagerAddress"] for node in ray.nodes() if node["NodeID"] == here]
    node_ids = sorted((node["NodeID"] for node in ray.nodes()), key=lambda one: one != here)
    ranks = [start_on(node_id) for node_id in node_ids]
    joined = [rank.join.remote(ip, number) for number, rank in enumerate(ranks)]
    found: dict[str, Any] = {"sums": ray.get(joined)}
    (directory / "joined").touch()
    wait_until(lambda: (directory / "parted").exists() or None)
    try:
        ray.get(ranks[0].sum.remote())
    except RuntimeError as error:
        found["collective"] = str(error)
    try:
        ray.get(ranks[1].sum.remote())
    except ActorDiedError as error:
        found["call"] = str(error)
    found["alive"] = [is_alive(node_id) for node_id in node_ids]
    partial = directory / "partial"
    partial.write_text(json.dumps(found))
    partial.rename(directory / "found")


def start_on(node_id: str) -> Any:
    actor_class: Any = ray.remote(Rank)
    scheduling = NodeAffinitySchedulingStrategy(node_id, soft=False)
    return actor_class.options(num_cpus=1, scheduling_strategy=scheduling).remote()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
