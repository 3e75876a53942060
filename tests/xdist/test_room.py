"""Where workers go when there is not room for all."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.clusters import wait_until
from tests.small_runs import small_config
from xdist.config import ClusterConfig, TrainConfig
from xdist.errors import NotEnoughResources
from xdist.topologies.actors import Room

pytestmark = [pytest.mark.ray, pytest.mark.timeout(120), pytest.mark.usefixtures("cluster")]


def large_workers(directory: Path) -> TrainConfig:
    """Two workers of which there is room for one: the cluster has 8 CPUs."""
    cluster = ClusterConfig(cpus_per_worker=5, gpus_per_worker=0, wait_s=2)
    return replace(small_config(directory, strategy="all_reduce"), cluster=cluster)


def test_without_room_for_all_there_is_none(tmp_path: Path) -> None:
    with pytest.raises(NotEnoughResources, match="no room for 2 workers"):
        Room(large_workers(tmp_path), num_workers=2)


def test_after_a_loss_the_fewest_that_may_train_are_enough(tmp_path: Path) -> None:
    room = Room(large_workers(tmp_path), num_workers=2, fewest_workers=1)
    wait_until(lambda: room.is_placed(1) or None)
    assert not room.is_placed(2)
    room.close()
