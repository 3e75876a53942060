"""Parts that are scored by workers of a real cluster."""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from torch import Tensor

from datapipe.position import Position
from tests.clusters import wait_until
from tests.small_runs import NUM_EVALUATION, NUM_LABELS, small_config
from xdist import checkpoint, sharded_scoring
from xdist import scorer as scorer_module
from xdist.checkpoint import Checkpoint, Cut, Manifest
from xdist.config import ClusterConfig
from xdist.errors import NotEnoughResources
from xdist.evaluation_config import EvaluationConfig
from xdist.flat import FlatModel
from xdist.label_space import LabelSpace
from xdist.scorer import Scorer, ScoringProcess
from xdist.scoring import ScoringPlan, plan_scoring, score_part
from xdist.sharded_scoring import count_workers, score_sharded
from xdist.state import STATISTICS, WEIGHTS
from xdist.worker import initial_model

NODES = ({"CPU": 4.0, "GPU": 2.0}, {"CPU": 3.0}, {"CPU": 0.5, "GPU": 4.0})


@pytest.mark.parametrize(
    ("cluster", "expected"),
    [
        (ClusterConfig(), (1, 2)),
        (ClusterConfig(gpus_per_worker=0), (0, 7)),
        (ClusterConfig(gpus_per_worker=2), (2, 1)),
        (ClusterConfig(gpus_per_worker=0, cpus_per_worker=2), (0, 3)),
        (ClusterConfig(cpus_per_worker=0.25), (1, 4)),
    ],
)
def test_auto_takes_the_workers_that_the_nodes_hold(
    cluster: ClusterConfig, expected: tuple[int, int]
) -> None:
    sized, num_workers = count_workers(cluster, NODES, num_workers="auto")
    assert (sized.gpus_per_worker, num_workers) == expected


def test_more_workers_than_fit_may_wait_and_none_that_fits_is_an_error() -> None:
    assert count_workers(ClusterConfig(), NODES, num_workers=50)[1] == 50
    with pytest.raises(NotEnoughResources, match="no node of the cluster has the 5 CPU and 1 GPU"):
        count_workers(ClusterConfig(cpus_per_worker=5), NODES, num_workers=1)


def planned(directory: Path, *, wait_s: float = 60) -> tuple[ScoringPlan, str]:
    """What is scored, in eight batches, and the checkpoint: of random weights."""
    config = replace(
        small_config(directory, strategy="push_pull", is_scored=True),
        evaluation=EvaluationConfig(batch_size=4),
        cluster=ClusterConfig(gpus_per_worker=0, wait_s=wait_s),
    )
    plan = plan_scoring(
        config,
        index_url=str(config.data.evaluation),
        num_classes=NUM_LABELS,
        labels=(),
        frequencies=[1.0] * NUM_LABELS,
    )
    flat = FlatModel(initial_model(config, num_classes=NUM_LABELS))
    url = str(directory / "checkpoint")
    parts = (
        checkpoint.write_range(url, {WEIGHTS: flat.weights}, start=0, stop=len(flat.weights)),
        checkpoint.write_statistics(url, {STATISTICS: flat.statistics}),
    )
    cut = Cut(0, 0, Position(), is_final=False)
    checkpoint.publish(url, Manifest(cut, flat.layout, parts, {}, config.to_json(), {}))
    return plan, url


@dataclass(frozen=True, eq=False)
class SignallingSpace(LabelSpace):
    """A label space whose first use, once, sends the process a signal."""

    marker: str
    """A file, which then says which process that was."""
    number: int

    def restrict(
        self, logits: Tensor, label_ids: Tensor, label_offsets: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        with suppress(FileExistsError), Path(self.marker).open("x") as marker:
            marker.write(str(os.getpid()))
            marker.close()
            os.kill(os.getpid(), self.number)
        return super().restrict(logits, label_ids, label_offsets)


@pytest.mark.faults
@pytest.mark.ray
@pytest.mark.timeout(120)
@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_part_whose_worker_is_lost_or_hangs_is_counted_again_and_once(
    tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if number == signal.SIGSTOP:
        monkeypatch.setattr(sharded_scoring, "LATE_S", 1.0)
    plan, url = planned(tmp_path)
    torch.set_num_threads(1)
    whole = score_part(plan, url, "raw", part=0, num_parts=1)
    marker = tmp_path / "process"
    space = SignallingSpace(plan.space.outputs, plan.space.columns, str(marker), number)
    sharded = score_sharded(replace(plan, space=space), url, "raw", num_workers=3)
    with suppress(ProcessLookupError):
        os.kill(int(marker.read_text()), signal.SIGKILL)
    assert ("once more" in caplog.text) == (number == signal.SIGSTOP)
    assert sharded.num_images == NUM_EVALUATION
    assert sharded.scores() == whole.scores()
    np.testing.assert_equal(sharded.per_class(), whole.per_class())


@pytest.mark.ray
@pytest.mark.timeout(120)
@pytest.mark.usefixtures("second_node")
def test_where_other_nodes_do_not_see_the_data_all_parts_run_here(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plan, url = planned(tmp_path)
    assert score_sharded(plan, url, "raw", num_workers=2).num_images == NUM_EVALUATION
    assert not caplog.records
    data = replace(plan.config.data, evaluation=str(tmp_path / "absent"))
    unseen = replace(plan, config=replace(plan.config, data=data))
    assert score_sharded(unseen, url, "raw", num_workers=2).num_images == NUM_EVALUATION
    assert "scoring is on this node, as 1 others do not see" in caplog.text


@pytest.mark.ray
@pytest.mark.timeout(120)
@pytest.mark.usefixtures("cluster")
def test_what_scores_is_on_the_drivers_node_where_it_gets_no_room_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As when the node is lost that had it. Two workers score the last checkpoint."""
    monkeypatch.setattr(scorer_module, "PULSE_S", 0.2)
    plan, url = planned(tmp_path, wait_s=1)
    evaluation = replace(plan.config.evaluation, num_gpus=1)
    checkpoints = replace(plan.config.checkpoint, evaluate_every=1)
    config = replace(plan.config, evaluation=evaluation, checkpoint=checkpoints)
    scorer = Scorer(replace(plan, config=config), config, save_every_samples=1)
    expected = score_part(plan, url, "raw").scores()

    def check_next(*, is_last: bool) -> None:
        scorer.add(Checkpoint.open(url), is_last=is_last)
        for _ in range(2):  # The averaged weights are the raw ones yet.
            wait_until(partial(is_scored, scorer))
            _, scores, _ = scorer.receive()
            assert scores == expected

    check_next(is_last=False)
    assert caplog.text.count("no room for what scores within 1 s") == 1
    scorer.take_room()
    check_next(is_last=True)
    assert not scorer.has_work


def is_scored(scorer: Scorer) -> bool | None:
    scorer.go_on()
    return (scorer.task is not None and bool(ray.wait([scorer.task], timeout=0)[0])) or None


class Tenant:
    def ready(self) -> None:
        """Hold the CPUs."""


@pytest.mark.ray
@pytest.mark.timeout(120)
@pytest.mark.usefixtures("cluster")
def test_a_full_cluster_is_waited_for_and_then_an_error(tmp_path: Path) -> None:
    """Which a run does not end for that has come to its last score."""
    plan, url = planned(tmp_path, wait_s=0.5)
    tenant_class: Any = ray.remote(Tenant)
    tenant = tenant_class.options(num_cpus=8).remote()
    ray.get(tenant.ready.remote())
    try:
        with pytest.raises(NotEnoughResources, match=r"no room for a worker of 1 CPU .* 0\.5 s"):
            score_sharded(plan, url, "raw", num_workers=2)
        scores, _, why_alone = ScoringProcess().score(plan, url, "raw", num_workers=2)
        assert scores == score_part(plan, url, "raw").scores()
        assert "no room for a worker" in str(why_alone)
    finally:
        ray.kill(tenant)
