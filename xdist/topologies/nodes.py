"""What all nodes of the cluster do, or see, alike; and what follows for where servers may run."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from xdist.errors import UserError
from xdist.topologies import RunPlan

logger = logging.getLogger(__name__)

Result = TypeVar("Result")


def here() -> str:
    """The id of this process's node."""
    node_id: str = ray.get_runtime_context().get_node_id()
    return node_id


def others() -> dict[str, str]:
    """The other nodes that are alive: id -> address."""
    nodes: list[dict[str, Any]] = ray.nodes()
    alive = {node["NodeID"]: node["NodeManagerAddress"] for node in nodes if node["Alive"]}
    return {node_id: address for node_id, address in alive.items() if node_id != here()}


def on_others(function: Callable[[], Result]) -> dict[str, Result]:
    """Call `function` on every other node at once: node id -> result."""
    task: Any = ray.remote(_call)
    references = {
        node_id: task.options(
            num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False)
        ).remote(function)
        for node_id in others()
    }
    return dict(zip(references, ray.get(list(references.values())), strict=True))


def _call(function: Callable[[], Result]) -> Result:
    return function()


def blind_to(path: str) -> list[str]:
    """The addresses of the nodes where the local `path` does not exist."""
    seen = on_others(partial(os.path.exists, path))
    addresses = others()
    return sorted(addresses[node_id] for node_id, exists in seen.items() if not exists)


def placed(plan: RunPlan) -> RunPlan:
    """`plan` with its servers beside the driver, where other nodes do not see the run directory.

    Raises `UserError` when they do not see the data, or for a synchronous run, whose workers save
    from wherever they are.
    """
    _require_seen(plan.index_url, "--data.train")
    if plan.config.strategy == "all_reduce":
        _require_seen(plan.run_dir, "--run-dir")
        return plan
    blind = _blind_to(plan.run_dir)
    if not blind:
        return plan
    logger.warning(
        "the servers run beside the driver, as %d other nodes do not see %s",
        len(blind),
        plan.run_dir,
    )
    return replace(plan, servers_node=here())


def _require_seen(url: str, option: str) -> None:
    blind = _blind_to(url)
    if blind:
        raise UserError(
            f"{url} is not seen by {len(blind)} other nodes ({', '.join(blind[:5])}); "
            f"give {option} a directory that all nodes share, or a URL (s3://, gs://)"
        )


def _blind_to(url: str) -> list[str]:
    return [] if "://" in url else blind_to(url)
