"""Scores of a checkpoint, counted in parts by workers of a Ray cluster.

The parts are contiguous and merged in their order, so the result is that of one worker, to the bit.
A part is a function of the plan and its number alone: one that is lost with its worker is counted
again, and so is one that takes much longer than the others, once.

Nothing is cancelled: with `ray.cancel`, forced or not, a task that ends at that moment ends the
whole calling process ("Tried to complete task that was not pending", ray 2.60). After an error,
what still runs goes on to its end, or to that of the caller.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Literal

import ray
from ray.exceptions import RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from datapipe.checks import AUTO
from datapipe.errors import DataError, TooManyBadSamples
from datapipe.index import ShardIndex
from xdist import fork_servers
from xdist.config import ClusterConfig
from xdist.errors import NotEnoughResources, UserError
from xdist.scoring import ScoringPlan, Tally, num_batches, score_part
from xdist.sizing import Nodes
from xdist.state import WeightsName
from xdist.topologies import nodes

logger = logging.getLogger(__name__)

LATE_S, LATE_RATIO = 60.0, 4.0
"""A part is late after so long, and after so many times what those took that are there."""
LOOK_EVERY_S = 1.0


def count_workers(
    cluster: ClusterConfig, resources: Nodes, *, num_workers: int | Literal["auto"]
) -> tuple[ClusterConfig, int]:
    """`cluster` with its GPUs as a number, and the number of workers; auto takes as many as fit.

    More than fit wait for their turn. Raises `NotEnoughResources` when not even one fits.
    """
    gpus = cluster.gpus_per_worker
    if not isinstance(gpus, int):
        gpus = int(any(node.get("GPU", 0) >= 1 for node in resources))
    room = sum(_room(node, cluster.cpus_per_worker, gpus) for node in resources)
    if not room:
        raise NotEnoughResources(
            f"no node of the cluster has the {cluster.cpus_per_worker:g} CPU and {gpus} GPU of a "
            "worker; lower --cpus-per-worker or --gpus-per-worker, or add nodes"
        )
    return replace(cluster, gpus_per_worker=gpus), room if num_workers == AUTO else num_workers


def _room(node: Mapping[str, float], cpus: float, gpus: int) -> int:
    by_cpus = int(node.get("CPU", 0) // cpus)
    return min(by_cpus, int(node.get("GPU", 0) // gpus)) if gpus else by_cpus


def score_sharded(
    plan: ScoringPlan, checkpoint_url: str, weights: WeightsName, *, num_workers: int
) -> Tally:
    """Count the evaluation set in `num_workers` parts, on the cluster that this process is
    connected to.

    Raises `NotEnoughResources` when there is no room for a worker within `cluster.wait_s`,
    `TooManyBadSamples`, and what a part raised.
    """
    cluster = plan.config.cluster
    options = placing(
        plan, checkpoint_url, num_cpus=cluster.cpus_per_worker, num_gpus=cluster.gpus_per_worker
    )
    _wait_for_room(options, plan.config.cluster)
    num_parts = min(num_workers, num_batches(plan))
    function: Any = score_part  # Ray's types know no keyword-only arguments.
    task = ray.remote(function).options(**options)
    shared = ray.put(plan)

    def start(part: int) -> ray.ObjectRef[Tally]:
        begun: ray.ObjectRef[Tally] = task.remote(
            shared, checkpoint_url, weights, part=part, num_parts=num_parts
        )
        return begun

    tally = Tally.empty(plan)
    for part in _counted(start, num_parts):
        tally.merge(part)
    num_samples = ShardIndex.open(plan.index_url).num_samples
    num_allowed = plan.config.data.bad_samples_allowed(num_samples)
    if len(tally.corrupt) > num_allowed:
        raise TooManyBadSamples(tuple(tally.corrupt), num_allowed)
    return tally


def placing(
    plan: ScoringPlan, checkpoint_url: str, *, num_cpus: float, num_gpus: float | str
) -> dict[str, Any]:
    """What a task, or an actor, that scores asks of the cluster: so much; it runs here, where other
    nodes do not see the files.
    """
    options: dict[str, Any] = {
        "num_cpus": num_cpus,
        "num_gpus": num_gpus,
        **fork_servers.options(plan.config.cluster),
    }
    for url in (checkpoint_url, plan.index_url, plan.config.data.evaluation):
        if url is not None and "://" not in url and (blind := nodes.blind_to(url)):
            logger.warning("scoring is on this node, as %d others do not see %s", len(blind), url)
            here = NodeAffinitySchedulingStrategy(nodes.here(), soft=False)
            return {**options, "scheduling_strategy": here}
    return options


def _wait_for_room(options: Mapping[str, Any], cluster: ClusterConfig) -> None:
    probe: Any = ray.remote(_nothing).options(**options)
    reference = probe.remote()
    ready, _ = ray.wait([reference], timeout=cluster.wait_s)
    if not ready:
        raise NotEnoughResources(
            f"no room for a worker of {cluster.cpus_per_worker:g} CPU and "
            f"{cluster.gpus_per_worker} GPU within {cluster.wait_s:g} s; end what else runs, or "
            "add nodes"
        )


def _nothing() -> None:
    """Take a place."""


def _counted(start: Callable[[int], ray.ObjectRef[Tally]], num_parts: int) -> list[Tally]:
    """All parts, in their order; or raise what the first one that failed raised."""
    began = time.monotonic()
    late_after_s, is_late = math.inf, False
    waiting = {start(part): part for part in range(num_parts)}
    tallies: dict[int, Tally] = {}
    while len(tallies) < num_parts:
        ready, _ = ray.wait([*waiting], timeout=LOOK_EVERY_S)
        took_s = time.monotonic() - began
        for reference in ready:
            part = waiting.pop(reference)
            if part in tallies:
                continue
            tally = tallies[part] = _get(reference)
            done = f"({len(tallies)}/{num_parts})"
            logger.info("part %d scored images=%d %s", part, tally.num_images, done)
            late_after_s = max(LATE_S, LATE_RATIO * took_s)
        if took_s > late_after_s and not is_late:
            is_late = True
            late = sorted(set(waiting.values()))
            logger.warning("parts %s are counted once more, as they take %.0f s", late, took_s)
            waiting |= {start(part): part for part in late}
    return [tallies[part] for part in range(num_parts)]


def _get(part: ray.ObjectRef[Tally]) -> Tally:
    try:
        tally: Tally = ray.get(part)
    except RayTaskError as error:
        if isinstance(error.cause, (DataError, UserError)):
            raise error.cause from error
        raise
    return tally
