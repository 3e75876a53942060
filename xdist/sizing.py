"""How many workers and servers a run gets: from its configuration and the cluster's resources.
Pure.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from xdist.config import TrainConfig
from xdist.errors import NotEnoughResources, UserError

WORKERS_PER_SERVER = 8
FEWEST_SERVERS = 2
LANES_PER_WORKER = 4

Nodes = Sequence[Mapping[str, float]]
"""The resources of each node."""


def sized(config: TrainConfig, resources: Nodes, *, resumes: bool = False) -> TrainConfig:
    """`config` with every `auto` resolved against the `resources` (CPU, GPU) of the nodes.

    resumes: of `fewest_to_begin`. Raises `NotEnoughResources` that says what is missing.
    """
    gpus = _gpus_per_worker(config, resources)
    cluster = replace(config.cluster, gpus_per_worker=gpus)
    config = _with(config, cluster=cluster)
    if isinstance(config.num_workers, int):
        num_workers = config.num_workers
    else:
        num_workers = max(_as_many_as_fit(config, resources), cluster.min_world_size)
    servers = _num_servers(config, num_workers)
    needed = fewest_to_begin(config, resumes=resumes)
    if not fits(config, resources, needed):
        raise NotEnoughResources(_missing(config, resources, needed, servers))
    num_servers = servers if config.strategy == "push_pull" else config.num_servers
    return _with(config, num_workers=num_workers, num_servers=num_servers)


def _with(config: TrainConfig, **changes: Any) -> TrainConfig:
    """The configuration with what this cluster makes of it. Raises `UserError` if that cannot
    be.
    """
    try:
        return replace(config, **changes)
    except ValueError as error:
        raise UserError(f"on this cluster, {error}") from error


def fewest_to_begin(config: TrainConfig, *, resumes: bool) -> int:
    """Workers that there must be room for before a run begins: what `auto` finds in all, others may
    hold in part. resumes: whether it was begun before, which as few may go on with as may be left.
    """
    if isinstance(config.num_workers, int) and not resumes:
        return config.num_workers
    return config.cluster.min_world_size


def most_workers(config: TrainConfig) -> int:
    """That a run of this configuration, whose workers are counted, may grow to."""
    assert isinstance(config.num_workers, int), "sized resolves auto"
    return config.cluster.max_world_size or config.num_workers


def most_images_of_a_worker(config: TrainConfig) -> int:
    """In a step of a run, while none of them is lost."""
    if config.strategy == "push_pull" or not isinstance(config.num_workers, int):
        return config.batch_size
    lanes = num_lanes(config, num_workers=most_workers(config))
    return -(-lanes // config.num_workers) * (config.batch_size // lanes)


def num_lanes(config: TrainConfig, *, num_workers: int) -> int:
    """Parts that an epoch is dealt in, where there may be so many workers: the configured number,
    or the smallest divisor of the batch with 4 a worker. Where workers keep their batch, a multiple
    of the workers.
    """
    keeps = config.on_resize == "keep_worker_batch"
    multiple_of = num_workers if keeps else 1
    if config.num_lanes is not None:
        if config.num_lanes < num_workers or config.num_lanes % multiple_of:
            of_what = f"multiples of {num_workers} workers" if keeps else f"at least {num_workers}"
            raise UserError(
                f"num_lanes is {config.num_lanes}; allowed: {of_what}, the most that there may be "
                "(num_workers, cluster.max_world_size)"
            )
        return config.num_lanes
    wanted = min(LANES_PER_WORKER * num_workers, config.batch_size)
    divisors = [
        lanes
        for lanes in range(num_workers, config.batch_size + 1)
        if config.batch_size % lanes == 0 and lanes % multiple_of == 0
    ]
    if not divisors:
        raise UserError(
            f"batch_size is {config.batch_size}; allowed: "
            + (f"multiples of {num_workers} workers" if keeps else f"at least {num_workers}")
            + ", the most that there may be (num_workers, cluster.max_world_size)"
        )
    return next((lanes for lanes in divisors if lanes >= wanted), divisors[-1])


def _gpus_per_worker(config: TrainConfig, resources: Nodes) -> int:
    gpus = config.cluster.gpus_per_worker
    return gpus if isinstance(gpus, int) else int(_total(resources, "GPU") >= 1)


def _total(resources: Nodes, name: str) -> float:
    return sum(node.get(name, 0) for node in resources)


def _num_servers(config: TrainConfig, num_workers: int) -> int:
    if config.strategy == "all_reduce":
        return 0
    if isinstance(config.num_servers, int):
        return config.num_servers
    return max(FEWEST_SERVERS, -(-num_workers // WORKERS_PER_SERVER))


def fits(config: TrainConfig, resources: Nodes, num_workers: int) -> bool:
    """Whether the nodes hold so many workers, and beside them servers, their replicas, and what
    scores: each on one node.
    """
    gpus = _gpus_per_worker(config, resources)
    free = [(node.get("CPU", 0), node.get("GPU", 0)) for node in resources]
    wanted = [(config.cluster.cpus_per_worker, gpus)] * num_workers
    server = config.cluster.cpus_per_server, config.cluster.gpus_per_server
    wanted += [server] * (_num_servers(config, num_workers) * (1 + config.servers.replicas))
    if config.data.evaluation is not None and config.checkpoint.evaluate_every:
        wanted.append((config.evaluation.num_cpus, config.evaluation.num_gpus))
    for cpus, gpus in wanted:
        rooms = (i for i, node in enumerate(free) if node[0] >= cpus and node[1] >= gpus)
        room = next(rooms, None)
        if room is None:
            return False
        left = round(free[room][0] - cpus, 4)  # Ray counts in ten-thousandths.
        free[room] = (left, free[room][1] - gpus)
    return True


def _as_many_as_fit(config: TrainConfig, resources: Nodes) -> int:
    """As many as fit beside the spares, at least one; not more than a synchronous run may have."""
    most, num_spares = 1, config.cluster.num_spares
    largest: float = math.inf
    if config.strategy == "all_reduce":
        most_that_may_be = (config.num_lanes, config.cluster.max_world_size)
        largest = min(config.batch_size, *(most or math.inf for most in most_that_may_be))
    while most < largest and fits(config, resources, most + 1 + num_spares):
        most += 1
    if config.on_resize == "keep_worker_batch" and config.cluster.max_world_size is None:
        while (config.num_lanes or config.batch_size) % most:  # All have as many samples.
            most -= 1
    return most


def _missing(config: TrainConfig, resources: Nodes, num_workers: int, num_servers: int) -> str:
    cluster = config.cluster
    gpus = _gpus_per_worker(config, resources)
    fields = ["num_workers" if isinstance(config.num_workers, int) else "cluster.min_world_size"]
    fields += ["cluster.cpus_per_worker"] + ["cluster.gpus_per_worker"] * bool(gpus)
    fields += ["cluster.cpus_per_server"] * (config.strategy == "push_pull")
    scoring = config.evaluation.num_cpus, config.evaluation.num_gpus
    is_scored = config.data.evaluation and config.checkpoint.evaluate_every and any(scoring)
    fields += ["evaluation.num_cpus", "evaluation.num_gpus"] * bool(is_scored)
    lower = f"{', '.join(fields[:-1])} or {fields[-1]}"
    each = _amounts(cluster.cpus_per_worker, gpus)
    of_server = _amounts(cluster.cpus_per_server, cluster.gpus_per_server)
    replicas = ", with replicas," if config.servers.replicas else ""
    servers = f" and {num_servers} servers{replicas} of {of_server}"
    there = f"{_total(resources, 'CPU'):g} CPU and {_total(resources, 'GPU'):g} GPU"
    there += f" on {len(resources)} nodes" if len(resources) > 1 else ""
    return (
        f"{num_workers} workers of {each}{servers if num_servers else ''}"
        f"{f' and scoring of {_amounts(*scoring)}' if is_scored else ''} do not fit: "
        f"the cluster has {there}; lower {lower}, or add nodes"
    )


def _amounts(cpus: float, gpus: int) -> str:
    return f"{cpus:g} CPU" + (f" and {gpus} GPU" if gpus else "")
