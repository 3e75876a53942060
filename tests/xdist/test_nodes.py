"""Runs on a cluster of two real nodes."""

from __future__ import annotations

import os
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from datapipe.order import SampleOrder
from datapipe.position import Position
from tests.clusters import run, small_config
from xdist import checkpoint
from xdist.errors import UserError
from xdist.topologies import RunPlan, nodes
from xdist.topologies.push_pull import PushPullTopology

pytestmark = [pytest.mark.ray, pytest.mark.timeout(180)]


def test_every_other_node_is_asked(second_node: str, tmp_path: Path) -> None:
    assert nodes.on_others(os.getpid).keys() == {second_node}
    assert nodes.blind_to(str(tmp_path)) == []
    absent = str(tmp_path / "absent")
    assert nodes.blind_to(absent) == ["127.0.0.1"]
    plan = RunPlan(
        config=small_config(tmp_path, strategy="push_pull"),
        run_dir=absent,
        index_url=str(tmp_path),
        num_classes=2,
        order=SampleOrder(8, block_size=4, blocks_per_pool=1, seed=0),
        num_places=8,
        save_every_samples=8,
    )
    assert nodes.placed(plan).servers_node == nodes.here()
    assert nodes.placed(replace(plan, run_dir=str(tmp_path))).servers_node is None
    with pytest.raises(UserError, match=r"absent is not seen by 1 other nodes .* --data.train"):
        nodes.placed(replace(plan, index_url=absent))
    with pytest.raises(UserError, match=r"absent is not seen by 1 other nodes .* --run-dir"):
        nodes.placed(replace(plan, config=small_config(tmp_path / "b", strategy="all_reduce")))


def on_first_node(first_node: str, plan: RunPlan) -> PushPullTopology:
    return PushPullTopology(replace(plan, servers_node=first_node))


@pytest.mark.usefixtures("second_node")
def test_an_asynchronous_run_spans_two_nodes(tmp_path: Path) -> None:
    config = small_config(tmp_path, strategy="push_pull", num_workers=9, num_epochs=1)
    make = partial(on_first_node, nodes.here())
    run(config, tmp_path / "run", topologies={"push_pull": make})
    found = checkpoint.latest(str(tmp_path / "run"))
    assert found is not None
    assert found.manifest.cut.position == Position(epoch=1)
