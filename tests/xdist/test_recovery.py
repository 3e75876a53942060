"""Synchronous runs in which workers are lost at planned steps: no step is lost or made twice."""

from __future__ import annotations

import json
import platform
import re
import signal
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from datapipe.position import Position
from tests.datapipe.fault_proxy import Fault as HttpFault
from tests.datapipe.fault_proxy import FaultProxy
from tests.datapipe.file_server import FileServer
from tests.recorded import Planned, Recording, kills, kills_when, recorded_topology, stops
from tests.small_runs import (
    NUM_LABELS,
    NUM_TRAIN,
    causes,
    final,
    records,
    run,
    saved_step,
    small_config,
    spoil,
    weights_of,
)
from xdist import checkpoint, optim
from xdist.compute_config import ComputeConfig
from xdist.config import CheckpointConfig, ClusterConfig, TrainConfig
from xdist.errors import PeerLost, RunFailed
from xdist.model_config import ModelConfig

pytestmark = [
    pytest.mark.faults,
    pytest.mark.ray,
    pytest.mark.timeout(240),
    pytest.mark.usefixtures("cluster"),
]


def config_of(directory: Path, **changes: Any) -> TrainConfig:
    config = small_config(directory, strategy="all_reduce", num_workers=3, **changes)
    return replace(config, batch_size=12, num_lanes=12, num_epochs=6)


def run_with(
    config: TrainConfig,
    directory: Path,
    *planned: Planned,
    full_size: int = 0,
    num_kills: int = 0,
    num_slow_steps: int = 0,
    slow_until: str = "",
) -> Recording:
    """Run to the end, and check that nothing was lost and nothing came twice."""
    topologies = recorded_topology(
        directory / "recording",
        planned,
        full_size=full_size,
        num_kills=num_kills,
        num_slow_steps=num_slow_steps,
        slow_until=slow_until,
    )
    run(config, directory / "run", topologies=topologies)
    for plan in planned:
        assert (directory / "recording" / plan.name).exists(), plan.name
    recording = Recording(directory / "recording")
    recording.check(num_samples=NUM_TRAIN, num_epochs=config.num_epochs)
    assert final(directory / "run").manifest.cut.position == Position(epoch=config.num_epochs)
    return recording


def test_an_undisturbed_run_is_one_group(tmp_path: Path) -> None:
    assert run_with(config_of(tmp_path), tmp_path).sizes() == [3]


@pytest.mark.parametrize("worker", [0, 1, pytest.param(2, marks=pytest.mark.by_hand)])
def test_the_others_go_on_when_one_is_killed_and_it_comes_back(tmp_path: Path, worker: int) -> None:
    recording = run_with(config_of(tmp_path), tmp_path, kills(worker, 10), full_size=3)
    assert recording.sizes() == [3, 2, 3]
    assert causes(tmp_path / "run") == [f"worker {worker} lost"]


def test_a_step_that_its_killed_worker_had_sent_all_of_counts(tmp_path: Path) -> None:
    plan = kills(1, 10, when="sent")
    recording = run_with(config_of(tmp_path), tmp_path, plan, full_size=3)
    assert recording.steps()[10][1] == 3
    assert recording.steps()[11][1] == 2


@pytest.mark.parametrize(
    "on_resize",
    ["keep_global_batch", pytest.param("keep_worker_batch", marks=pytest.mark.by_hand)],
)
def test_the_only_one_that_is_ahead_dies_while_the_group_recovers(
    tmp_path: Path, on_resize: str
) -> None:
    """Workers 0 and 2 make update 7, and 2 dies in it, having sent its share; 1 was told before
    that a peer is lost; 0 dies before it has sent its state. So nobody is left who knows of it.
    """
    planned = [
        Planned("lose", 1, 7, lose_peer),
        kills(2, 7, when="sent"),
        kills(0, 8, when="joining"),
    ]
    config = config_of(tmp_path, on_resize=on_resize, report_every_steps=100)
    topologies = recorded_topology(tmp_path / "recording", planned)
    run(config, tmp_path / "run", topologies=topologies)
    recording = Recording(tmp_path / "recording")
    makers = {line["generation"] for line in recording.applied if line["step"] == 7}
    assert len(makers) == 2
    assert final(tmp_path / "run").manifest.cut.position == Position(epoch=config.num_epochs)


def test_one_survivor_goes_on_alone(tmp_path: Path) -> None:
    recording = run_with(config_of(tmp_path), tmp_path, kills(0, 10), kills(2, 10), full_size=3)
    assert recording.sizes()[:2] == [3, 1]
    assert recording.sizes()[-1] == 3


def test_a_spare_takes_the_place_within_the_step_to_the_bit(tmp_path: Path) -> None:
    config = config_of(tmp_path, cluster=ClusterConfig(num_spares=1, collective_timeout_s=60))
    run(config, tmp_path / "undisturbed")
    spare_is_ready = tmp_path / "recording" / "ready-3"
    recording = run_with(config, tmp_path, kills_when(spare_is_ready, 1, 10))
    assert recording.sizes() == [3, 3]
    disturbed, undisturbed = final(tmp_path / "run"), final(tmp_path / "undisturbed")
    assert torch.equal(weights_of(disturbed), weights_of(undisturbed))
    assert torch.equal(weights_of(disturbed, "momentum"), weights_of(undisturbed, "momentum"))
    assert torch.equal(
        disturbed.read_statistics()["statistics"], undisturbed.read_statistics()["statistics"]
    )


def test_with_lanes_as_groups_the_numbers_do_not_depend_on_who_is_lost(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    config = replace(
        config,
        # Batch norm of two values is nearly their sign: it would magnify the last bit at once.
        data=replace(config.data, image_size=64),
        num_lanes=6,
        compute=ComputeConfig(precision="float64"),
        bn_group="lane",
        model=ModelConfig(num_classes=NUM_LABELS, width=0.0625, middle_modules=0, dropout=0.3),
        max_steps=20,
    )
    run(config, tmp_path / "undisturbed")
    topologies = recorded_topology(tmp_path / "recording", [kills(0, 7), kills(2, 12)])
    run(config, tmp_path / "run", topologies=topologies)
    assert Recording(tmp_path / "recording").sizes()[:2] == [3, 2]
    assert causes(tmp_path / "run") == ["worker 0 lost", "worker 2 lost"]
    disturbed, undisturbed = (
        weights_of(final(tmp_path / "run")),
        weights_of(final(tmp_path / "undisturbed")),
    )
    assert disturbed.dtype == torch.float64
    torch.testing.assert_close(disturbed, undisturbed, rtol=0, atol=1e-6)
    assert not torch.equal(disturbed, undisturbed)


def test_a_worker_killed_while_the_group_recovers_is_replaced_too(tmp_path: Path) -> None:
    # Before any of it is sent: worker 2 has made no update then that is lost with it.
    planned = kills(1, 10, when="tried"), kills(2, 10, when="joining")
    recording = run_with(config_of(tmp_path), tmp_path, *planned, full_size=3)
    assert recording.sizes()[:2] == [3, 1]
    assert sorted(causes(tmp_path / "run")) == ["worker 1 lost", "worker 2 lost"]


def test_when_all_are_killed_the_last_checkpoint_counts(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = config_of(tmp_path)
    run(config, tmp_path / "undisturbed")
    saved = Path(checkpoint.checkpoint_url(str(tmp_path / "run"), 4), checkpoint.MANIFEST)
    planned = [kills_when(saved, worker, 20) for worker in range(3)]
    topologies = recorded_topology(tmp_path / "recording", planned)
    run(config, tmp_path / "run", topologies=topologies)
    assert_set_back(tmp_path, [event.name for event in planned], caplog)
    disturbed, undisturbed = final(tmp_path / "run"), final(tmp_path / "undisturbed")
    assert disturbed.manifest.cut == undisturbed.manifest.cut
    assert torch.equal(weights_of(disturbed), weights_of(undisturbed))


def assert_set_back(directory: Path, names: list[str], caplog: pytest.LogCaptureFixture) -> None:
    """All of this happened, and the run went on from a checkpoint that is not its first one."""
    assert all((directory / "recording" / name).exists() for name in names)
    [step] = re.findall(r"run set back to its last checkpoint step=(\d+)", caplog.text)
    saved = {record["step"] for record in records(directory / "run", "checkpoint")}
    assert 0 < int(step) < 20
    assert int(step) in saved
    made_by = Recording(directory / "recording").generations()
    assert [len(made_by[at]) for at in range(1, 20)] == [
        1 + (at > int(step)) for at in range(1, 20)
    ]


def test_when_all_hang_they_are_ended_and_the_last_checkpoint_counts(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = config_of(tmp_path, cluster=ClusterConfig(collective_timeout_s=1))
    planned = [Planned(f"hang-{number}", number, 20, signal.pause, "tried") for number in range(3)]
    topologies = recorded_topology(tmp_path / "recording", planned)
    run(config, tmp_path / "run", topologies=topologies)
    assert final(tmp_path / "run").manifest.cut.position == Position(epoch=config.num_epochs)
    reasons = [record["reason"] for record in records(tmp_path / "run", "recovery")]
    assert any("was in 'compute' for 1" in reason for reason in reasons)
    assert_set_back(tmp_path, [event.name for event in planned], caplog)


def test_ten_kills_in_a_row_lose_nothing(tmp_path: Path) -> None:
    config = replace(config_of(tmp_path), num_epochs=40)
    run_with(config, tmp_path, full_size=3, num_kills=10)
    assert len(causes(tmp_path / "run")) == 10


def test_a_run_beyond_its_budget_of_recoveries_ends_and_can_be_resumed(
    tmp_path: Path,
) -> None:
    config = config_of(tmp_path, cluster=ClusterConfig(max_recoveries=0))
    topologies = recorded_topology(tmp_path / "recording", [kills(1, 20)])
    with pytest.raises(RunFailed, match=r"1 faults .*cluster\.max_recoveries allows 0") as caught:
        run(config, tmp_path / "run", topologies=topologies)
    assert f"s ago, worker 1 on {platform.node()}: " in str(caught.value)
    assert saved_step(tmp_path / "run") == max(Recording(tmp_path / "recording").steps())
    run(config, tmp_path / "run", topologies=topologies)
    assert final(tmp_path / "run").manifest.cut.position == Position(epoch=config.num_epochs)


@pytest.mark.parametrize("workers", [[1], [0, 1, 2]])
def test_an_exception_ends_the_run_with_its_traceback_when_the_others_have_saved(
    tmp_path: Path, workers: list[int]
) -> None:
    """What nobody else has is lost since the last checkpoint."""
    planned = [Planned(f"break-{worker}", worker, 10, break_down) for worker in workers]
    topologies = recorded_topology(tmp_path / "recording", planned)
    late = CheckpointConfig(every_samples=100_000, evaluate_every=0)
    with pytest.raises(ZeroDivisionError) as caught:
        run(config_of(tmp_path, checkpoint=late), tmp_path / "run", topologies=topologies)
    assert "break_down" in str(caught.value)
    assert causes(tmp_path / "run") == []
    saved = saved_step(tmp_path / "run")
    assert saved >= 9 if workers == [1] else saved == 0


def break_down() -> None:
    print(1 / 0)  # noqa: T201 - it is never printed


def test_a_stopped_worker_is_found_ended_and_replaced(tmp_path: Path) -> None:
    config = config_of(tmp_path, cluster=ClusterConfig(collective_timeout_s=2))
    recording = run_with(config, tmp_path, stops(1, 10), full_size=3)
    # Whoever reads notices late: the new one may be there first.
    assert recording.sizes() in ([3, 2, 3], [3, 3])
    [recovery] = records(tmp_path / "run", "recovery")
    assert "gave no answer" in recovery["reason"]
    first, second, *_ = [group["pause_s"] for group in records(tmp_path / "run", "group")]
    assert first is None
    assert second > 2


def run_with_a_read_that_fails(
    config: TrainConfig, directory: Path, fault: HttpFault, **reading: Any
) -> str:
    """Shards over HTTP, of which one read meets the fault. Returns why a worker was lost."""
    with (
        FileServer(Path(config.data.train)) as files,
        FaultProxy(files.url, {30: fault}) as proxy,
    ):
        data = replace(config.data, train=proxy.url, prefetch_batches=1, **reading)
        recording = run_with(replace(config, data=data), directory, full_size=3)
        assert proxy.served == [fault]
    # Whoever reads notices late: the new one may be there first.
    assert recording.sizes() in ([3, 2, 3], [3, 3])
    [recovery] = records(directory / "run", "recovery")
    return str(recovery["reason"])


def test_a_worker_that_hangs_in_a_read_is_ended_and_replaced(tmp_path: Path) -> None:
    config = config_of(tmp_path, cluster=ClusterConfig(collective_timeout_s=2))
    reason = run_with_a_read_that_fails(config, tmp_path, "stall", read_timeout_s=200)
    assert "was in 'data' for" in reason


def test_a_worker_whose_read_gives_up_is_lost_and_the_run_goes_on(tmp_path: Path) -> None:
    reason = run_with_a_read_that_fails(config_of(tmp_path), tmp_path, "refuse", read_retries=0)
    assert "503" in reason


def test_workers_that_keep_their_batch_make_smaller_steps_while_they_are_fewer(
    tmp_path: Path,
) -> None:
    config = replace(config_of(tmp_path), on_resize="keep_worker_batch", report_every_steps=1)
    assert run_with(config, tmp_path, kills(1, 10), full_size=3).sizes() == [3, 2, 3]
    train = records(tmp_path / "run", "train")
    sizes = [record["num_workers"] for record in train]
    alone = [record for record in train if record["num_workers"] == 2]
    assert sizes[0] == sizes[-1] == 3
    assert alone[2]["samples"] - alone[1]["samples"] == 8
    base = optim.learning_rate(config.optimizer, alone[1]["samples"])
    assert alone[2]["learning_rate"] == pytest.approx(base * 8 / 12)


def test_what_a_lost_worker_could_not_decode_is_listed(tmp_path: Path) -> None:
    config = replace(config_of(tmp_path), num_epochs=1, report_every_steps=1000)
    spoil(Path(config.data.train) / "train-00000.tar", num_samples=6)
    planned = [kills(worker, 7, when="sent") for worker in (0, 1)]
    topologies = recorded_topology(tmp_path / "recording", planned)
    run(config, tmp_path / "run", topologies=topologies)
    lines = (tmp_path / "run" / "quarantine.jsonl").read_text().splitlines()
    keys = [json.loads(line)["key"] for line in lines]
    assert sorted(keys) == [f"{number:06d}" for number in range(6)]


def test_a_spare_that_is_ready_first_waits_for_who_has_the_state(tmp_path: Path) -> None:
    config = replace(config_of(tmp_path, cluster=ClusterConfig(num_spares=1)), num_workers=1)
    (tmp_path / "recording").mkdir()
    topologies = recorded_topology(tmp_path / "recording", starts_after={0: "ready-1"})
    run(config, tmp_path / "run", topologies=topologies)
    recording = Recording(tmp_path / "recording")
    recording.check(num_samples=NUM_TRAIN, num_epochs=config.num_epochs)
    assert recording.sizes() == [1]


def test_a_worker_that_hangs_while_it_saves_is_ended_and_the_step_saved(tmp_path: Path) -> None:
    config = config_of(tmp_path, cluster=ClusterConfig(collective_timeout_s=2))
    hang = Planned("hang", 1, 5, wait_for_ever, when="save")
    run_with(config, tmp_path, hang)
    [recovery] = records(tmp_path / "run", "recovery")
    assert "was in 'save' for" in recovery["reason"]
    saved = [record["step"] for record in records(tmp_path / "run", "checkpoint")]
    assert saved == sorted(set(saved))


def wait_for_ever() -> None:
    threading.Event().wait()


def test_a_newcomer_whom_the_others_do_not_reach_does_not_hold_them_up(tmp_path: Path) -> None:
    cluster = ClusterConfig(max_world_size=3, collective_timeout_s=2)
    config = replace(config_of(tmp_path, cluster=cluster), num_workers=2, num_epochs=30)
    unreached = Planned("unreached", 2, 0, lose_peer, when="every_join")
    recording = run_with(
        config, tmp_path, unreached, full_size=0, num_slow_steps=100, slow_until=unreached.name
    )
    assert set(recording.sizes()) == {2}
    assert set(causes(tmp_path / "run")) == {"worker 2 lost"}


def lose_peer() -> None:
    raise PeerLost("nobody is reached from here")
