"""A cluster that adds nodes by itself: Ray's autoscaler (v1), its nodes raylets on this machine.

    with autoscaling_cluster(num_cpus=1, cpus_per_node=1, max_workers=1) as scaling:
        scaling.set_max_workers(2)

Nodes come for what is asked for and fits nowhere: `ray.autoscaler.sdk.request_resources`, pending
placement groups, actors and tasks; in 2 to 6 s, also after the limit was raised. They are children
of the head's monitor, and end with the head. There is one request in a cluster, whoever made it:
the last one holds, beyond the end of its driver, until another, such as `bundles=[]`. While it
holds, nodes stay, however idle.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from local_head import LocalHead

from tests.clusters import QUICK_HEALTH_CHECKS, Cluster, own_cluster

FILE = "autoscaling.json"
VARIABLES = {"RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1"}


@dataclass(frozen=True)
class AutoscalingCluster:
    """A cluster, and the file that its autoscaler reads again every second."""

    cluster: Cluster
    file: Path

    def set_max_workers(self, max_workers: int) -> None:
        """Let there be so many nodes beside the head, from now on."""
        raise_max_workers(self.file, max_workers)


def raise_max_workers(file: Path, max_workers: int) -> None:
    """The same, from any process that reaches the file."""
    write(file, with_max_workers(json.loads(file.read_text()), max_workers))


@contextmanager
def autoscaling_cluster(
    *, num_cpus: int, cpus_per_node: int, max_workers: int, idle_timeout_s: float = 3600
) -> Iterator[AutoscalingCluster]:
    """A head of `num_cpus` CPUs, and nodes that come when wanted and go when long idle."""

    def arguments(head: LocalHead) -> Sequence[str]:
        content = configuration(head.address, cpus_per_node, idle_timeout_s=idle_timeout_s)
        write(head.directory / FILE, with_max_workers(content, max_workers))
        return [f"--autoscaling-config={head.directory / FILE}"]

    variables = {**QUICK_HEALTH_CHECKS, **VARIABLES}
    with own_cluster(num_cpus=num_cpus, variables=variables, arguments=arguments) as cluster:
        yield AutoscalingCluster(cluster, cluster.head.directory / FILE)


def configuration(address: str, cpus_per_node: int, *, idle_timeout_s: float) -> dict[str, Any]:
    """What a cluster YAML says, without its limits. The keys are those that Ray insists on."""
    return {
        "cluster_name": "fake_multinode",
        "idle_timeout_minutes": idle_timeout_s / 60,
        "upscaling_speed": 100,
        "provider": {
            "type": "fake_multinode",
            "gcs_address": address,
            "use_node_id_as_ip": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
        },
        "auth": {"ssh_user": "nobody"},
        "available_node_types": {
            "ray.head.default": {"resources": {}, "node_config": {}, "max_workers": 0},
            "worker": {"resources": {"CPU": cpus_per_node}, "node_config": {}},
        },
        "head_node_type": "ray.head.default",
        "file_mounts": {},
        "cluster_synced_files": [],
        "file_mounts_sync_continuously": False,
        "rsync_exclude": [],
        "rsync_filter": [],
        "initialization_commands": [],
        "setup_commands": [],
        "head_setup_commands": [],
        "worker_setup_commands": [],
        "head_start_ray_commands": [],
        "worker_start_ray_commands": [],
    }


def with_max_workers(content: dict[str, Any], max_workers: int) -> dict[str, Any]:
    types = content["available_node_types"]
    worker = {**types["worker"], "min_workers": 0, "max_workers": max_workers}
    types = {**types, "worker": worker}
    return {**content, "max_workers": max_workers, "available_node_types": types}


def write(file: Path, content: dict[str, Any]) -> None:
    """At once, for a reader that may come at any moment."""
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(content))
    os.replace(partial, file)
