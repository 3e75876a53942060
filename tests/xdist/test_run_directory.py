"""A run directory keeps its records, its configuration, and its twin in the bucket."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import fsspec
import pytest

from datapipe.config import DataConfig
from datapipe.errors import CorruptSample
from datapipe.storage import read_bytes
from xdist.compute_config import ComputeConfig
from xdist.config import CheckpointConfig, ClusterConfig, OptimizerConfig, TrainConfig
from xdist.errors import RunDirectoryError, RunTaken
from xdist.profiling import Profile
from xdist.run_directory import CONFIG as CONFIG_NAME
from xdist.run_directory import RunDirectory, identity
from xdist.step_phases import StepTimes

CONFIG = TrainConfig(
    data=DataConfig(train="somewhere"),
    strategy="all_reduce",
    loss="softmax",
    batch_size=8,
    num_epochs=1,
)


def begin(url: str) -> None:
    """A run of `CONFIG` that got as far as to store it."""
    with RunDirectory(url, CONFIG) as run:
        run.store(CONFIG_NAME, CONFIG.to_json())


def test_records_come_back_in_order(tmp_path: Path) -> None:
    run = RunDirectory(str(tmp_path / "run"), CONFIG)
    run.record(kind="start", step=1, samples=8)
    run.record(kind="start", step=2, samples=16)
    run.close()
    with RunDirectory(str(tmp_path / "run"), CONFIG) as again:
        assert [record["step"] for record in again.records()] == [1, 2]


def test_it_belongs_to_one_run_at_a_time(tmp_path: Path) -> None:
    with (
        RunDirectory(str(tmp_path), CONFIG),
        pytest.raises(RunDirectoryError, match="in use by a run that is under way"),
    ):
        RunDirectory(str(tmp_path), CONFIG)
    RunDirectory(str(tmp_path), CONFIG).close()


def test_of_a_long_run_some_records_of_training_will_do(tmp_path: Path) -> None:
    with RunDirectory(str(tmp_path), CONFIG) as run:
        for step in range(100):
            run.record(kind="evaluation" if step % 10 == 3 else "train", step=step)
        found = run.records(most_of_training=20)
        assert len(run.records(most_of_training=200)) == 100
    training = [record["step"] for record in found if record["kind"] == "train"]
    assert 10 < len(training) <= 20
    assert training[-1] >= 90
    assert len(found) - len(training) == 10


def test_a_line_that_a_crash_cut_short_is_left_out(tmp_path: Path) -> None:
    run = RunDirectory(str(tmp_path), CONFIG)
    run.record(kind="start", step=1, samples=8)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "tra')
    run.close()
    run = RunDirectory(str(tmp_path), CONFIG)
    run.record(kind="start", step=2, samples=16)
    assert [record["step"] for record in run.records()] == [1, 2]
    run.close()


def test_another_configuration_is_refused_with_the_field(tmp_path: Path) -> None:
    begin(str(tmp_path))
    changed = replace(CONFIG, optimizer=OptimizerConfig(learning_rate=0.5))
    with pytest.raises(RunDirectoryError, match=r"optimizer.learning_rate = 0.045, not 0.5"):
        RunDirectory(str(tmp_path), changed)


def test_a_run_that_did_not_begin_claims_nothing(tmp_path: Path) -> None:
    RunDirectory(str(tmp_path), CONFIG).close()
    RunDirectory(str(tmp_path), replace(CONFIG, data=DataConfig(train="elsewhere"))).close()


def test_a_field_that_is_new_had_its_default(tmp_path: Path) -> None:
    older = CONFIG.to_json()
    del older["optimizer"]["l2_on"]
    with RunDirectory(str(tmp_path), CONFIG) as run:
        run.store(CONFIG_NAME, older)
    RunDirectory(str(tmp_path), CONFIG).close()


def test_what_does_not_change_the_training_may_change(tmp_path: Path) -> None:
    begin(str(tmp_path))
    changed = replace(
        CONFIG,
        data=replace(CONFIG.data, max_bad_samples=7, decode_threads=3, evaluation="held-out"),
        num_workers=3,
        cluster=ClusterConfig(max_recoveries=3),
        checkpoint=CheckpointConfig(keep=1),
    )
    RunDirectory(str(tmp_path), changed).close()


def test_a_run_may_go_on_computing_in_another_way(tmp_path: Path) -> None:
    begin(str(tmp_path))
    compute = ComputeConfig(
        precision="bfloat16", accumulation_steps=2, channels_last=True, compile=True
    )
    changed = replace(
        CONFIG, compute=compute, compress_gradients="bfloat16", deterministic=True, profile=True
    )
    RunDirectory(str(tmp_path), changed).close()


@pytest.mark.parametrize(
    "compute",
    [
        ComputeConfig(channels_last=True, compile=True),
        ComputeConfig(cuda_graphs=True, fused_optimizer=True),
    ],
)
def test_what_changes_numbers_within_rounding_does_not_tell_runs_apart(
    compute: ComputeConfig,
) -> None:
    assert identity(replace(CONFIG, compute=compute, profile=True)) == identity(CONFIG)


def test_precision_and_parts_tell_runs_apart() -> None:
    for changed in (
        replace(CONFIG, compute=ComputeConfig(precision="bfloat16")),
        replace(CONFIG, compute=ComputeConfig(accumulation_steps=2)),
        replace(CONFIG, compress_gradients="bfloat16"),
        replace(CONFIG, deterministic=True),
    ):
        assert identity(changed) != identity(CONFIG)


@pytest.mark.parametrize("is_remote", [False, True])
def test_a_profile_is_written_where_the_run_is(is_remote: bool, tmp_path: Path) -> None:
    url = "memory://profiled/run" if is_remote else str(tmp_path / "run")
    profile = Profile(StepTimes(2, {"backward": 0.3, "forward": 0.1}), b"trace")
    with RunDirectory(url, CONFIG) as run:
        run.store_profile(profile)
        run.sync()
    assert read_bytes(f"{url}/profile/trace.json.gz") == b"trace"
    assert read_bytes(f"{url}/profile/steps.txt").decode().splitlines() == [
        "mean of 2 steps                 ms       %",
        "forward                      50.00    25.0",
        "backward                    150.00    75.0",
        "step                        200.00   100.0",
    ]


def test_resources_do_not_tell_runs_apart() -> None:
    more = replace(CONFIG, num_workers=3, data=replace(CONFIG.data, max_bad_samples=7))
    assert identity(more) == identity(CONFIG)
    assert identity(replace(CONFIG, num_epochs=2)) != identity(CONFIG)


def test_a_directory_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunDirectoryError, match=r"file/run cannot be written: .*--run-dir"):
        RunDirectory(str(tmp_path / "file" / "run"), CONFIG)


def test_corrupt_samples_are_listed_once(tmp_path: Path) -> None:
    run = RunDirectory(str(tmp_path), CONFIG)
    first, second = (CorruptSample("a.tar", key, 512, "broken") for key in "79")
    assert len(run.quarantine([first])) == 1
    assert len(run.quarantine([first, second])) == 2  # Met again in the next epoch, listed once.
    run.close()
    text = (tmp_path / "quarantine.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    assert [line["key"] for line in lines] == ["7", "9"]
    assert lines[0] == {"shard": "a.tar", "key": "7", "offset": 512, "reason": "broken"}


def test_curves_are_drawn_at_a_sync_and_not_as_it_opens(tmp_path: Path) -> None:
    with RunDirectory(str(tmp_path), CONFIG) as run:
        assert not (tmp_path / "curves.png").exists()
        run.sync()
        assert (tmp_path / "curves.png").exists()


def test_a_remote_directory_has_everything_after_a_sync() -> None:
    url = "memory://bucket/run"
    begin(url)
    run = RunDirectory(url, CONFIG)
    run.record(kind="start", step=5, samples=40, time=0.0)
    run.sync()
    run.close()
    filesystem = fsspec.filesystem("memory")
    names = {Path(path).name for path in filesystem.ls("/bucket/run", detail=False)}
    assert {"config.json", "metrics.jsonl", "curves.png"} <= names
    with RunDirectory(url, CONFIG) as again:
        assert [record["step"] for record in again.records()] == [5]
        local = again.local
    assert not local.exists()


def test_a_remote_directory_belongs_to_who_has_begun_a_run_there_last() -> None:
    url = "memory://bucket/taken"
    with RunDirectory(url, CONFIG) as first, RunDirectory(url, CONFIG) as last:
        first.take()
        first.check_owned()
        last.take()
        last.check_owned()
        with pytest.raises(RunTaken, match=r"taken is driven by process \d+ on .*; this run ends"):
            first.check_owned()
        for run, step in ((last, 5), (first, 3)):
            run.record(kind="start", step=step, samples=8 * step, time=0.0)
            run.sync()
    assert json.loads(read_bytes(f"{url}/metrics.jsonl"))["step"] == 5


def test_where_it_is_not_told_whose_it_is_it_is_told_anew() -> None:
    url = "memory://bucket/told"
    with RunDirectory(url, CONFIG) as run:
        for content in (None, b"", b"[]", b'{"token": 1}'):
            if content is not None:
                fsspec.filesystem("memory").pipe("/bucket/told/owner.json", content)
            run.check_owned()
            assert set(json.loads(read_bytes(f"{url}/owner.json"))) == {"token", "host", "process"}
