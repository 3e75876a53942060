"""Runs on a cluster of two real nodes."""

from __future__ import annotations

import os
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from datapipe.order import SampleOrder
from datapipe.position import Position
from tests.small_runs import run, small_config
from xdist import checkpoint
from xdist.errors import UserError
from xdist.servers_config import ServersConfig
from xdist.topologies import Outcome, RunPlan, Task, nodes
from xdist.topologies.push_pull import PushPullTopology
from xdist.training_data import TrainingData

pytestmark = [pytest.mark.ray, pytest.mark.timeout(180)]


def test_a_node_that_has_another_directory_of_the_name_is_told_from_one_that_sees_it(
    tmp_path: Path,
) -> None:
    (tmp_path / "run").mkdir()
    assert nodes.mark_of(str(tmp_path / "run")) is None
    (tmp_path / "run" / "config.json").write_text("{}")
    mark = nodes.mark_of(str(tmp_path / "run"))
    assert mark is not None
    nodes.require_run_directory(str(tmp_path / "run"), mark)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["config.json"]
    os.utime(tmp_path / "run" / "config.json", ns=(0, 0))
    for directory in ("run", "none"):
        with pytest.raises(UserError, match="does not see the run directory"):
            nodes.require_run_directory(str(tmp_path / directory), mark)


def make_plan(directory: Path, *, strategy: str) -> RunPlan:
    config = small_config(directory, strategy=strategy)
    return RunPlan(
        config=config,
        run_dir=str(directory),
        data=TrainingData(
            index_urls=(config.data.train,),
            order=SampleOrder(8, block_size=4, blocks_per_pool=1, seed=0),
            labels=(),
            num_labels=2,
            fingerprint="",
        ),
        num_classes=2,
        num_places=8,
        save_every_samples=8,
        fewest_to_begin=2,
    )


@pytest.mark.usefixtures("second_node")
def test_every_other_node_is_asked(tmp_path: Path) -> None:
    assert list(nodes.on_others(os.getpid)) == ["127.0.0.1"]
    assert nodes.blind_to(str(tmp_path)) == []
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UserError, match=r"node 127.0.0.1: .*[Nn]o such file.*; mend or remove"):
        nodes.on_others(partial(os.listdir, str(tmp_path / "absent")))


@pytest.mark.usefixtures("second_node")
def test_what_other_nodes_do_not_see_is_named_with_its_option(tmp_path: Path) -> None:
    plan = make_plan(tmp_path, strategy="push_pull")
    absent = str(tmp_path / "absent")
    assert nodes.placed(plan).servers_node is None
    assert nodes.placed(replace(plan, run_dir=absent)).servers_node == nodes.here()
    not_seen = r"absent.* is not seen by 1 other nodes \(127.0.0.1\); give "
    for option, changes in (
        ("--data.train", {"train": absent}),
        ("--data.mix", {"mix": (absent,)}),
    ):
        data = replace(plan.config.data, **changes)
        with pytest.raises(UserError, match=not_seen + option):
            nodes.placed(replace(plan, config=replace(plan.config, data=data)))
    indexed = replace(plan.data, index_urls=(f"{absent}/index/train",))
    with pytest.raises(UserError, match=not_seen + "--run-dir"):
        nodes.placed(replace(plan, run_dir=absent, data=indexed))
    plan = make_plan(tmp_path / "sync", strategy="all_reduce")
    with pytest.raises(UserError, match=not_seen + "--run-dir"):
        nodes.placed(replace(plan, run_dir=absent))


def on_first_node(first_node: str, plan: RunPlan) -> PushPullTopology:
    return PushPullTopology(replace(plan, servers_node=first_node))


class NotesPlaces(PushPullTopology):
    """Which replicas share the node of their primary."""

    def __init__(self, plan: RunPlan, *, shared: set[bool]) -> None:
        super().__init__(plan)
        self._shared = shared

    def receive(self, task: Task, result: Any) -> Outcome:
        outcome = super().receive(task, result)
        for number, replica in self._servers._replicas.items():
            primary = self._servers._primaries[number]
            if replica.process is not None and primary.process is not None:
                self._shared.add(replica.process.node_id == primary.process.node_id)
        return outcome


@pytest.mark.long
@pytest.mark.usefixtures("second_node")
def test_replicas_are_on_another_node_than_their_primaries(tmp_path: Path) -> None:
    """Though they reserve nothing, which Ray places anywhere."""
    shared: set[bool] = set()
    servers = ServersConfig(replicas=1)
    config = small_config(tmp_path, strategy="push_pull", servers=servers, num_servers=3)
    make = partial(NotesPlaces, shared=shared)
    run(replace(config, num_epochs=1), tmp_path / "run", topologies={"push_pull": make})
    assert shared == {False}


@pytest.mark.long
@pytest.mark.usefixtures("second_node")
def test_an_asynchronous_run_spans_two_nodes(tmp_path: Path) -> None:
    config = small_config(tmp_path, strategy="push_pull", num_workers=9, num_epochs=1)
    make = partial(on_first_node, nodes.here())
    run(config, tmp_path / "run", topologies={"push_pull": make})
    found = checkpoint.latest(str(tmp_path / "run"))
    assert found is not None
    assert found.manifest.cut.position == Position(epoch=1)
