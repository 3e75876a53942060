"""What all nodes of the cluster do, or see, alike; and what follows for where servers may run."""

from __future__ import annotations

import logging
import math
import os
import platform
import secrets
import signal
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import ray
from ray._private.state import state
from ray.autoscaler.sdk import request_resources
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from tenacity import Retrying, retry_if_result, stop_after_delay, wait_fixed

from datapipe.decode import KernelInfo, active_kernel
from datapipe.storage import remove, write_bytes
from xdist import native_update, sizing
from xdist.config import TrainConfig
from xdist.errors import UserError
from xdist.failures import reason_of
from xdist.run_directory import CONFIG
from xdist.topologies import RunPlan
from xdist.topologies.actors import worker_bundle

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

ANSWERED_WITHIN_S = 60.0
"""By a node, whose first process may have to start, and import torch."""
REQUEST_EVERY_S = 30.0
"""From one request to the autoscaler to the next."""
PROBE_BYTES = 1 << 16
"""Of nothing, a disk that is full has room."""


def here() -> str:
    """The id of this process's node."""
    node_id: str = ray.get_runtime_context().get_node_id()
    return node_id


def others() -> dict[str, str]:
    """The other nodes that are alive: id -> address."""
    nodes: list[dict[str, Any]] = ray.nodes()
    alive = {node["NodeID"]: node["NodeManagerAddress"] for node in nodes if node["Alive"]}
    return {node_id: address for node_id, address in alive.items() if node_id != here()}


def staying() -> frozenset[str]:
    """The ids of the nodes that are alive, and not about to go."""
    return frozenset({here(), *others()}) - draining()


def other_than(node_id: str, *, turn: int) -> str | None:
    """The id of a node that stays and is not this one, if there is any: by turns."""
    found = sorted(staying() - {node_id})
    return found[turn % len(found)] if found else None


def draining() -> frozenset[str]:
    """The ids of the nodes that are about to go (a notice of pre-emption, `ray drain-node`)."""
    return frozenset(state.get_draining_nodes())


def to_leave() -> frozenset[str]:
    """The same, but for this process's node, which it cannot leave: were nobody else there, Ray
    would end it before its time, and with it all that this process has started anywhere.
    """
    return draining() - {here()}


def with_room(bundle: Mapping[str, float]) -> set[str]:
    """The ids of the nodes on which so much is free now, and that stay."""
    return {node_id for node_id, has in free().items() if covers(has, bundle)} - draining()


def free() -> dict[str, dict[str, float]]:
    """What is free now on each node."""
    found: dict[str, dict[str, float]] = state.available_resources_per_node()
    return found


def covers(free: Mapping[str, float], wanted: Mapping[str, float]) -> bool:
    """Whether so much is free. Ray counts in ten-thousandths, sums of floats do not."""
    return all(free.get(name, 0.0) > amount - 5e-5 for name, amount in wanted.items())


def resources() -> list[dict[str, float]]:
    """What each node that is alive has in all."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def resources_for(config: TrainConfig, *, resumes: bool) -> list[dict[str, float]]:
    """What each node has; where the run may grow, or was begun before, after the cluster had
    `cluster.wait_s` to make room for the fewest workers that it may begin with.
    """
    cluster = config.cluster
    if cluster.max_world_size is not None:
        WorkerRequest(config, cluster.max_world_size).keep()
    elif not resumes:
        return resources()
    fewest = sizing.fewest_to_begin(config, resumes=resumes)
    retrying = Retrying(
        retry=retry_if_result(lambda found: not sizing.fits(config, found, fewest)),
        wait=wait_fixed(1.0),
        stop=stop_after_delay(cluster.wait_s),
        retry_error_callback=lambda _state: resources(),
    )
    found: list[dict[str, float]] = retrying(resources)
    return found


class WorkerRequest:
    """Has the autoscaler make room for so many workers, where the run may grow, until
    `withdraw_request`. There is one such request in a cluster: that of another run replaces it, and
    the end of that run withdraws it. So it is made again and again.
    """

    def __init__(self, config: TrainConfig, num_workers: int) -> None:
        self._may_grow = config.cluster.max_world_size is not None
        self._bundles = [worker_bundle(config.cluster)] * num_workers
        self._made = -math.inf

    def keep(self) -> None:
        """Make it, if it was not made for a while."""
        now = time.monotonic()
        if self._may_grow and now - self._made > REQUEST_EVERY_S:
            request_resources(bundles=self._bundles)
            self._made = now


def withdraw_request() -> None:
    """Ask the autoscaler for nothing any more."""
    request_resources(bundles=[])


def on_others(function: Callable[[], Result]) -> dict[str, Result]:
    """Call `function` on every other node at once: address -> result. Raises `UserError` for the
    first one that could not do it. Left out, with a warning, is a node that does not answer: it is
    gone, though the cluster may not know yet.
    """
    task: Any = ray.remote(_call)
    addresses = {
        task.options(
            num_cpus=0,
            max_retries=0,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False),
        ).remote(function): address
        for node_id, address in others().items()
    }
    if not addresses:  # Ray would not wait for nothing.
        return {}
    answered, silent = ray.wait(
        list(addresses), num_returns=len(addresses), timeout=ANSWERED_WITHIN_S
    )
    results = {}
    for reference in answered:
        address = addresses[reference]
        try:
            results[address] = ray.get(reference)
        except RayTaskError as error:
            raise UserError(f"node {address}: {error.cause}; mend or remove that node") from error
        except RayError as error:
            logger.warning("node %s is left out: %s", address, reason_of(error))
    for reference in silent:
        said = "node %s is left out: no answer within %g s"
        logger.warning(said, addresses[reference], ANSWERED_WITHIN_S)
    return results


def _call(function: Callable[[], Result]) -> Result:
    return function()


@dataclass(frozen=True)
class Kernels:
    """What does the work on a node: compiled code, or what stands in for it."""

    decoder: KernelInfo
    update: Literal["native", "torch"]


def kernels() -> dict[str, Kernels]:
    """What decodes JPEGs and updates weights on each node, by address; a warning names those where
    decoding is slow.
    """
    found = {ray.util.get_node_ip_address(): _kernels(), **on_others(_kernels)}
    logger.info(
        "kernels found decoding=%s updates=%s",
        ",".join(sorted({node.decoder.name for node in found.values()})),
        ",".join(sorted({node.update for node in found.values()})),
    )
    slow = {address: node for address, node in found.items() if node.decoder.name == "fallback"}
    if slow:
        address, node = next(iter(slow.items()))
        logger.warning(
            "decoding takes two to three times as long on %d of %d nodes, first %s: %s; "
            "there, python -m datapipe doctor says what to do",
            len(slow),
            len(found),
            address,
            node.decoder.detail,
        )
    return found


def _kernels() -> Kernels:
    return Kernels(active_kernel(), "native" if native_update.is_available() else "torch")


@dataclass(frozen=True)
class Process:
    """A process somewhere in the cluster."""

    node_id: str
    process_id: int
    host: str
    """The name of its machine, for people."""


def this_process() -> Process:
    """This one."""
    return Process(here(), os.getpid(), platform.node())


def kill(process: Process) -> None:
    """SIGKILL, without waiting for it. Where Ray is told to kill an actor that does not answer, its
    process ends only after five seconds.
    """
    if process.node_id == here():
        _kill(process.process_id)
        return
    task: Any = ray.remote(_kill)
    strategy = NodeAffinitySchedulingStrategy(process.node_id, soft=False)
    task.options(num_cpus=0, max_retries=0, scheduling_strategy=strategy).remote(process.process_id)


def _kill(process_id: int) -> None:
    """End a worker process of Ray's, if it still is one."""
    with suppress(OSError):
        if b"ray::" in Path(f"/proc/{process_id}/cmdline").read_bytes():
            os.kill(process_id, signal.SIGKILL)


def mark_of(directory: str) -> tuple[int, int] | None:
    """What tells the directory of a run from every other one of that name; None for a URL, and
    where there is no run in it.
    """
    config = Path(directory) / CONFIG
    if "://" in directory or not config.exists():
        return None
    status = config.stat()
    return status.st_size, status.st_mtime_ns


def require_run_directory(directory: str, mark: tuple[int, int] | None) -> None:
    """Raise `UserError` where another directory is on this node, or none, or it cannot be written
    there. mark: of the right one.
    """
    address = ray.util.get_node_ip_address()
    if mark is not None and mark_of(directory) != mark:
        raise UserError(
            f"node {address} does not see the run directory {directory}: no worker trains there; "
            "give --run-dir a directory that all nodes share, or a URL (s3://, gs://)"
        )
    probe = f"{directory}/.written-{secrets.token_hex(8)}"
    try:
        write_bytes(probe, bytes(PROBE_BYTES))
        remove(probe)
    except OSError as error:
        raise UserError(
            f"node {address} cannot write into the run directory {directory}, where workers save: "
            f"{error}; mend or remove that node"
        ) from error


def blind_to(path: str) -> list[str]:
    """The addresses of the nodes that do not see the local directory or file `path`.

    A directory is seen where a new file in it is: one of the same name may be anywhere. What cannot
    be written here is seen where it exists.
    """
    if not others():
        return []
    probe = Path(path) / f".seen-{secrets.token_hex(8)}"
    try:
        probe.touch()
    except OSError:
        seen = on_others(partial(os.path.exists, path))
    else:
        seen = on_others(partial(os.path.exists, str(probe)))
        probe.unlink()
    return sorted(address for address, is_seen in seen.items() if not is_seen)


def placed(plan: RunPlan) -> RunPlan:
    """`plan` with its servers beside the driver, where other nodes do not see the run directory.

    Raises `UserError` when they do not see the data, or for a synchronous run, whose workers save
    from wherever they are, as servers with GPUs do.
    """
    for url in plan.config.data.sources:
        _require_seen(url, "--data.train" if url == plan.config.data.train else "--data.mix")
    is_indexed_here = any(url.startswith(plan.run_dir) for url in plan.data.index_urls)
    is_sync = plan.config.strategy == "all_reduce"
    if is_sync or plan.config.cluster.gpus_per_server or is_indexed_here:
        _require_seen(plan.run_dir, "--run-dir")
        return plan
    blind = _blind_to(plan.run_dir)
    if not blind:
        return plan
    logger.warning(
        "the servers run beside the driver and reserve no CPU, as %d other nodes do not see %s",
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
