"""Fields that only the other strategy reads change nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest

from datapipe.config import DataConfig
from xdist.compute_config import ComputeConfig
from xdist.config import ClusterConfig, TrainConfig
from xdist.servers_config import ServersConfig
from xdist.strategy_fields import without_ignored

SYNC = TrainConfig(
    data=DataConfig(train="somewhere"),
    strategy="all_reduce",
    loss="softmax",
    batch_size=8,
    num_epochs=1,
    num_workers=2,
)


def test_what_only_servers_read_is_ignored_without_them(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    servers = ServersConfig(replicas=1, wire="bfloat16")
    cluster = ClusterConfig(cpus_per_server=1, min_world_size=2)
    config = replace(SYNC, servers=servers, num_servers=3, cluster=cluster)
    kept = ClusterConfig(min_world_size=2)
    assert without_ignored(config) == replace(SYNC, cluster=kept)
    ignored = "num_servers, cluster.cpus_per_server, servers.replicas, servers.wire"
    assert f"ignored with strategy all_reduce: {ignored}" in caplog.text


def test_what_only_a_group_reads_is_ignored_with_servers() -> None:
    config = replace(
        SYNC,
        num_lanes=4,
        bn_group="lane",
        compress_gradients="bfloat16",
        cluster=ClusterConfig(num_spares=1, wait_s=5),
        compute=ComputeConfig(fused_optimizer=True, channels_last=True),
    )
    assert without_ignored(replace(config, strategy="push_pull")) == replace(
        SYNC,
        strategy="push_pull",
        cluster=ClusterConfig(wait_s=5),
        compute=ComputeConfig(channels_last=True),
    )
    assert without_ignored(config) == config
