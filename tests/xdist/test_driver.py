"""Whole runs on a real Ray, with real faults."""

from __future__ import annotations

import itertools
import json
import logging
import math
import platform
import re
import threading
from collections.abc import Iterable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from local_head import LocalHead
from torch import Tensor

from datapipe.batch import Batch, normalize
from datapipe.decode import active_kernel
from datapipe.plan import BatchPlan, lane_batches
from datapipe.position import Position
from tests.small_runs import (
    NUM_LABELS,
    NUM_TRAIN,
    Fault,
    batches_of,
    causes,
    faulty,
    final,
    records,
    run,
    small_config,
    spoil,
    weights_of,
)
from tests.strategies import Wrapped, collect_gradients
from xdist import native_update, optim
from xdist.computation import BatchSums, make_loss
from xdist.config import CheckpointConfig, ClusterConfig, TrainConfig
from xdist.errors import NotEnoughResources, RunDirectoryError, RunFailed
from xdist.evaluation_config import EvaluationConfig
from xdist.flat import FlatModel
from xdist.servers_config import ServersConfig
from xdist.strategies import UpdateStrategy
from xdist.topologies.all_reduce import AllReduceTopology, all_reduce_strategy
from xdist.topologies.push_pull import PushPullTopology, push_pull_strategy
from xdist.update import Step, Update
from xdist.worker import initial_model

pytestmark = [pytest.mark.ray, pytest.mark.timeout(180), pytest.mark.usefixtures("cluster")]

NUM_STEPS = 2 * math.ceil(NUM_TRAIN / 4)
STRATEGIES = ("all_reduce", "push_pull")


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_run_trains_saves_and_scores(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, strategy: str
) -> None:
    caplog.set_level(logging.INFO)
    config = small_config(tmp_path, strategy=strategy, is_scored=True)
    config = replace(config, evaluation=EvaluationConfig(batch_size=8, num_cpus=1))
    config = replace(config, checkpoint=replace(config.checkpoint, evaluate_every=1))
    summary = run(config, tmp_path / "run")
    assert final(tmp_path / "run").manifest.cut.position == Position(epoch=2)
    assert summary.num_samples == 2 * NUM_TRAIN
    assert set(summary.scores) == {"average", "raw"}
    measure = "top1" if strategy == "all_reduce" else "map100"
    assert 0 <= summary.scores["average"][measure] <= 1
    scored = records(tmp_path / "run", "evaluation")
    assert scored[0]["step"] < scored[-1]["step"]
    assert [record["scores"] for record in scored[-2:]] == list(summary.scores.values())
    files = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"config.json", "metrics.jsonl", "curves.png", "tensorboard", "checkpoints"} <= files
    train = records(tmp_path / "run", "train")
    assert train[-1]["samples"] == 2 * NUM_TRAIN
    assert (train[-1]["staleness_mean"] is None) == (strategy == "all_reduce")
    assert all(math.isfinite(record["loss"]) for record in train)
    if strategy == "push_pull" and native_update.is_available():
        assert numbers_shared(caplog.text) == {"2"}


@pytest.mark.long
def test_less_may_be_sent_to_servers_elsewhere(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    config = small_config(tmp_path, strategy="push_pull", max_steps=12)
    servers = ServersConfig(shared_memory=False, wire="bfloat16", factors=True)
    config = replace(config, servers=servers, model=replace(config.model, fc=(64,)))
    run(config, tmp_path / "run")
    assert final(tmp_path / "run").manifest.cut.num_samples == 48
    # One worker may have made all steps before the other was there.
    assert numbers_shared(caplog.text) == {"0"}


def numbers_shared(log: str) -> set[str]:
    """With how many of two servers workers share memory, each that has joined."""
    return set(re.findall(r"worker \d joined servers=2 sharing_memory=(\d)", log))


class Slow(Wrapped):
    """A strategy whose gradients take long."""

    def begin(self, batch: Batch, sums: BatchSums) -> None:
        threading.Event().wait(0.15)
        self.strategy.begin(batch, sums)


def slow_but_the_first(*arguments: Any, number: int) -> Any:
    strategy = push_pull_strategy(*arguments, number=number)
    return Slow(strategy) if number else strategy


@pytest.mark.long
@pytest.mark.parametrize(
    ("servers", "clip_norm"),
    [
        (ServersConfig(max_clock_lead=1), 1.0),
        (ServersConfig(commit_first=2, start_over_steps=6), None),
    ],
)
def test_workers_that_wait_for_slow_ones_come_to_the_end(
    tmp_path: Path, servers: ServersConfig, clip_norm: float | None
) -> None:
    config = small_config(tmp_path, strategy="push_pull", num_workers=3, servers=servers)
    config = replace(config, num_epochs=1, optimizer=replace(config.optimizer, clip_norm=clip_norm))
    make = partial(PushPullTopology, make_strategy=slow_but_the_first)
    run(config, tmp_path / "run", topologies={"push_pull": make})
    cut = final(tmp_path / "run").manifest.cut
    assert cut.position == Position(epoch=1)
    assert cut.num_samples == NUM_TRAIN


def test_two_synchronous_runs_are_equal_to_the_bit(tmp_path: Path) -> None:
    config = small_config(tmp_path, strategy="all_reduce")
    curves = []
    for name in ("one", "two"):
        run(config, tmp_path / name)
        train = records(tmp_path / name, "train")
        curves.append([(record["step"], record["loss"]) for record in train])
    assert curves[0] == curves[1]
    assert torch.equal(weights_of(final(tmp_path / "one")), weights_of(final(tmp_path / "two")))


def test_a_run_that_is_over_says_that_it_has_no_steps_to_profile(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = small_config(tmp_path, strategy="all_reduce", max_steps=9)
    run(config, tmp_path / "run")
    run(replace(config, profile=True), tmp_path / "run")
    assert "no profile: no worker 0 made 8 steps" in caplog.text


def test_one_synchronous_worker_equals_a_plain_loop_to_the_bit(tmp_path: Path) -> None:
    config = small_config(tmp_path, strategy="all_reduce", num_workers=1, max_steps=12)
    plans = lane_batches(
        Position(), num_samples=NUM_TRAIN, num_lanes=4, samples_per_lane=1, lanes=range(4),
        num_epochs=1,
    )  # fmt: skip
    run(config, tmp_path / "run")
    flat, average, statistics = plain_loop(config, itertools.islice(plans, 12))
    saved = final(tmp_path / "run")
    assert saved.manifest.cut.step == 12
    assert torch.equal(weights_of(saved), flat)
    assert torch.equal(weights_of(saved, "average"), average)
    assert torch.equal(saved.read_statistics()["statistics"], statistics)


def plain_loop(config: TrainConfig, plans: Iterable[BatchPlan]) -> tuple[Tensor, Tensor, Tensor]:
    """The same training without Ray and lanes: weights, average, statistics."""
    config = config.resolved(NUM_TRAIN)
    flat = FlatModel(initial_model(config, num_classes=NUM_LABELS).train())
    running, average = flat.statistics.clone(), flat.weights.clone()
    size = flat.layout.num_weights
    mask = flat.layout.l2_mask(config.optimizer.l2_on)
    optimizer = optim.make_optimizer(config.optimizer, size=size, l2_mask=mask)
    compute_losses = make_loss(config)
    for step, batch in enumerate(batches_of(config, plans)):
        logits = flat.model(normalize(batch.images))
        loss = compute_losses(logits, batch.label_ids, batch.label_offsets)
        torch.autograd.backward((loss * batch.sample_weights).sum() / batch.num_samples)
        collect_gradients(flat)
        decay = optim.average_decay(config.optimizer, num_samples=4, num_updates=step)
        rate = optim.learning_rate(config.optimizer, 4 * step)
        optimizer.step(Update(flat.weights, [Step(flat.gradients, rate)]))
        optim.fold(average, flat.weights, share=1 - decay)
        optim.fold(running, flat.statistics, share=flat.layout.statistics_momentum)
    return flat.weights, average, running


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_run_goes_on_where_it_stopped(tmp_path: Path, strategy: str) -> None:
    config = small_config(tmp_path, strategy=strategy, num_workers=1)
    config = replace(config, model=replace(config.model, dropout=0.3))
    run(config, tmp_path / "whole")
    run(config, tmp_path / "parts")
    steps = sorted((tmp_path / "parts" / "checkpoints").iterdir())
    for late in steps[3:]:  # As after a crash: these were never published.
        (late / "manifest.json").unlink()
    run(config, tmp_path / "parts")
    start = records(tmp_path / "parts", "start")[-1]
    assert start["step"] == int(steps[2].name[5:])
    update = "native" if native_update.is_available() else "torch"
    kernels = {"decoder": asdict(active_kernel()), "update": update}
    assert list(start["kernels"].values()) == [kernels]
    whole, parts = final(tmp_path / "whole"), final(tmp_path / "parts")
    assert whole.manifest.cut == parts.manifest.cut
    assert torch.equal(weights_of(whole), weights_of(parts))
    assert torch.equal(weights_of(whole, "average"), weights_of(parts, "average"))


def test_a_finished_run_is_not_trained_again(tmp_path: Path) -> None:
    config = small_config(tmp_path, strategy="all_reduce", max_steps=4, is_scored=True)
    first = run(config, tmp_path / "run")
    second = run(config, tmp_path / "run")
    assert second.scores == first.scores
    assert second.step == first.step == 4


def test_a_run_changes_from_servers_to_all_reduce_and_back(tmp_path: Path) -> None:
    """By its strategy alone, whatever is said of what only one of them has."""
    config = small_config(tmp_path, strategy="push_pull", num_servers=3)
    config = replace(config, servers=ServersConfig(replicas=1), bn_group="lane", num_lanes=2)
    run(replace(config, max_steps=12), tmp_path / "run")
    assert final(tmp_path / "run").manifest.cut.step == 12
    run(replace(config, strategy="all_reduce", max_steps=30), tmp_path / "run")
    assert final(tmp_path / "run").manifest.cut.step == 30
    summary = run(config, tmp_path / "run")
    assert summary.num_samples == 2 * NUM_TRAIN
    assert summary.step > 30


@pytest.mark.faults
def test_a_killed_asynchronous_worker_is_replaced_and_nothing_is_lost(tmp_path: Path) -> None:
    config = small_config(tmp_path, strategy="push_pull")
    fault = Fault(worker=1, own_step=5, marker=str(tmp_path / "struck"))
    make = partial(PushPullTopology, make_strategy=faulty(push_pull_strategy, fault))
    run(config, tmp_path / "run", topologies={"push_pull": make})
    assert Path(fault.marker).exists()
    assert final(tmp_path / "run").manifest.cut.position == Position(epoch=2)
    assert causes(tmp_path / "run") == ["worker 1 lost"]
    assert records(tmp_path / "run", "recovery")[0]["host"] == platform.node()


@pytest.mark.faults
@pytest.mark.long
def test_an_update_of_several_pushes_waits_for_the_one_that_replaces_a_killed_worker(
    tmp_path: Path,
) -> None:
    config = small_config(tmp_path, strategy="push_pull", servers=ServersConfig(commit_first=2))
    fault = Fault(worker=1, own_step=5, marker=str(tmp_path / "struck"))
    make = partial(PushPullTopology, make_strategy=faulty(push_pull_strategy, fault))
    run(config, tmp_path / "run", topologies={"push_pull": make})
    assert causes(tmp_path / "run") == ["worker 1 lost"]
    cut = final(tmp_path / "run").manifest.cut
    assert cut.position == Position(epoch=2)
    # Of 46 batches two make an update, but for some while one is being lost, and at the end.
    assert 23 <= cut.step <= 27


@pytest.mark.faults
def test_a_killed_synchronous_worker_costs_no_sample(tmp_path: Path) -> None:
    config = small_config(tmp_path, strategy="all_reduce")
    run(config, tmp_path / "undisturbed")
    fault = Fault(worker=0, own_step=25, marker=str(tmp_path / "struck"))
    make = partial(AllReduceTopology, make_strategy=faulty(all_reduce_strategy, fault))
    run(config, tmp_path / "run", topologies={"all_reduce": make})
    assert Path(fault.marker).exists()
    disturbed, undisturbed = final(tmp_path / "run"), final(tmp_path / "undisturbed")
    assert disturbed.manifest.cut == undisturbed.manifest.cut
    assert causes(tmp_path / "run") == ["worker 0 lost"]
    sizes = [record["num_workers"] for record in records(tmp_path / "run", "group")]
    assert sizes[:2] == [2, 1]


@pytest.mark.faults
def test_too_many_faults_end_the_run_with_their_history(tmp_path: Path) -> None:
    config = small_config(
        tmp_path, strategy="push_pull", cluster=ClusterConfig(max_recoveries=0, wait_s=30)
    )
    fault = Fault(worker=1, own_step=2, marker=str(tmp_path / "struck"))
    make = partial(PushPullTopology, make_strategy=faulty(push_pull_strategy, fault))
    with pytest.raises(
        RunFailed, match=r"1 faults .*, cluster.max_recoveries allows 0 .*:\s+0 s ago, worker 1"
    ):
        run(config, tmp_path / "run", topologies={"push_pull": make})


class Broken(Exception):
    """A bug."""


def broken_strategy(*arguments: Any, **named: Any) -> UpdateStrategy:
    if named["number"] == 1:
        raise Broken("worker 1 has a bug")
    return all_reduce_strategy(*arguments, **named)


def test_an_exception_in_one_worker_ends_the_run_with_its_traceback(tmp_path: Path) -> None:
    config = small_config(tmp_path, strategy="all_reduce")
    make = partial(AllReduceTopology, make_strategy=broken_strategy)
    with pytest.raises(Broken, match="worker 1 has a bug") as caught:
        run(config, tmp_path / "run", topologies={"all_reduce": make})
    assert "broken_strategy" in str(caught.value)


def test_more_workers_than_there_is_room_for_are_refused(tmp_path: Path) -> None:
    config = small_config(tmp_path, strategy="push_pull", num_workers=9)
    with pytest.raises(NotEnoughResources, match="9 workers of 1 CPU and 2 servers"):
        run(config, tmp_path / "run")


@pytest.mark.long
def test_an_asynchronous_run_grows_where_there_is_room(tmp_path: Path) -> None:
    config = small_config(
        tmp_path,
        strategy="push_pull",
        num_workers=1,
        num_epochs=20,
        servers=ServersConfig(start_over_steps=40),
        cluster=ClusterConfig(max_world_size=3),
    )
    run(config, tmp_path / "run")
    numbers = [record["num_workers"] for record in records(tmp_path / "run", "train")]
    assert numbers[-1] == 3
    assert numbers == sorted(numbers)
    assert final(tmp_path / "run").manifest.cut.position == Position(epoch=20)


def test_room_that_others_hold_is_waited_for_and_then_named(
    tmp_path: Path, cluster: LocalHead
) -> None:
    assert cluster
    actor_class: Any = ray.remote(Holder)
    holder = actor_class.options(num_cpus=7).remote()
    ray.get(holder.ready.remote())
    config = small_config(tmp_path, strategy="push_pull", cluster=ClusterConfig(wait_s=1))
    try:
        with pytest.raises(NotEnoughResources, match=r"no room for 2 workers .* free now: 1 CPU"):
            run(config, tmp_path / "run")
    finally:
        ray.kill(holder)


class Holder:
    """Holds CPUs."""

    def ready(self) -> None:
        """Return when it holds them."""


def test_corrupt_samples_are_skipped_listed_and_counted(tmp_path: Path) -> None:
    config = small_config(tmp_path, strategy="push_pull", num_epochs=1)
    spoil(Path(config.data.train) / "train-00000.tar", num_samples=3)
    run(config, tmp_path / "run")
    lines = (tmp_path / "run" / "quarantine.jsonl").read_text().splitlines()
    assert sorted(json.loads(line)["key"] for line in lines) == ["000000", "000001", "000002"]
    assert final(tmp_path / "run").manifest.cut.position == Position(epoch=1)


def test_another_configuration_does_not_go_into_the_same_directory(tmp_path: Path) -> None:
    config = small_config(
        tmp_path, strategy="all_reduce", max_steps=2, checkpoint=CheckpointConfig()
    )
    run(config, tmp_path / "run")
    with pytest.raises(RunDirectoryError, match=r"holds a run with batch_size = 4, not 8"):
        run(replace(config, batch_size=8), tmp_path / "run")
