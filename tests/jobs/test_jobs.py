"""The job files, as a user starts them."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import typing
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import ray._private.state
import webdataset
from imagenet_sync import PRESETS as SYNC_PRESETS
from jft_async import PRESETS as ASYNC_PRESETS
from local_head import LocalHead
from ray.job_submission import JobSubmissionClient

from datapipe.index import ShardIndex
from tests.clusters import ROOT, wait_until
from tests.datapipe.small_sets import encode, picture
from tests.jobs.small_jobs import SMALL, SMALL_DATA, data_options, main
from tests.small_runs import records
from xdist import command_line
from xdist.config import TrainConfig
from xdist.invocation import parse
from xdist.model_config import MODEL_NAMES

pytestmark = [pytest.mark.ray, pytest.mark.timeout(240)]


@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize("job", ["imagenet_sync", "jft_async"])
def test_a_job_runs_for_two_steps(
    tmp_path: Path, job: str, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [*data_options(tmp_path), "--max-steps", "2", "--run-dir", str(tmp_path / "run")]
    assert main(options, job=job) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["step"], summary["num_samples"]) == (2, 8)
    assert "run finished" in capsys.readouterr().err
    assert "scored step=2" in (tmp_path / "run" / "log.txt").read_text()


@pytest.mark.faults
@pytest.mark.parametrize(
    ("job", "number", "code"),
    [
        ("imagenet_sync", signal.SIGTERM, 143),
        pytest.param("jft_async", signal.SIGINT, 130, marks=pytest.mark.by_hand),
    ],
)
def test_a_signal_ends_the_actors_and_the_run_resumes(
    tmp_path: Path, cluster: LocalHead, job: str, number: int, code: int
) -> None:
    endless = ["--num-epochs", "100000", "--report-every-steps", "1", "--cluster.wait-s", "20"]
    options = [*data_options(tmp_path), *endless, "--run-dir", str(tmp_path / "run")]
    options = [*SMALL, *SMALL_DATA, "--preset", "cifar", *options]
    options += ["--checkpoint.every-samples", "400"]
    for life in (1, 2):
        with (tmp_path / "log").open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, f"jobs/{job}.py", *options],
                cwd=ROOT,
                env=cluster.environment,
                stdout=log,
                stderr=log,
                preexec_fn=heed_interrupts,
            )
        wait_until(partial(has_saved, tmp_path / "run", life=life))
        process.send_signal(number)
        assert process.wait(30) == code
        log_text = (tmp_path / "log").read_text()
        assert "saves what is trained, for at most 30 s" in log_text
        assert "the same command resumes" in log_text
        trained, saved = (
            max(record["step"] for record in records(tmp_path / "run", kind))
            for kind in ("train", "checkpoint")
        )
        assert saved >= trained
        found = ray._private.state.actors().values()
        assert [actor for actor in found if actor["State"] != "DEAD"] == []
    starts = [record["step"] for record in records(tmp_path / "run", "start")]
    assert starts[0] == 0 < starts[1]


@pytest.mark.long
def test_a_signal_before_the_cluster_is_there_is_told_as_any_other(
    tmp_path: Path, cluster: LocalHead
) -> None:
    options = [*SMALL, *SMALL_DATA, "--preset", "cifar", *data_options(tmp_path)]
    options += ["--run-dir", str(tmp_path / "run")]
    process = subprocess.Popen(
        [sys.executable, "jobs/imagenet_sync.py", *options],
        cwd=ROOT,
        env=cluster.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if b"run directory" in line:
            break  # At once: a few ms of a start Ray's own handler, not Python's, has the signal.
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 143
    assert b"the same command resumes" in output


def has_saved(run_dir: Path, *, life: int) -> str | None:
    """Something, once the run has published a checkpoint since it was started for this time."""
    if not (run_dir / "metrics.jsonl").exists():
        return None
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    starts = [number for number, line in enumerate(lines) if '"start"' in line]
    if len(starts) < life:
        return None
    return next((line for line in lines[starts[-1] :] if '"checkpoint"' in line), None)


def heed_interrupts() -> None:
    """A background process of a shell ignores SIGINT, and so would all that it starts."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.usefixtures("cluster")
def test_shards_of_stock_tools_train_and_are_scored(tmp_path: Path) -> None:
    for split, count in (("train", 24), ("evaluation", 12)):
        (tmp_path / split).mkdir()
        with webdataset.TarWriter(str(tmp_path / split / "a.tar")) as tar:
            for number in range(count):
                sample = {"__key__": f"{number}", "jpeg": encode(picture(number))}
                tar.write({**sample, "json": {"labels": [number % 3, 3]}})
    options = ["--data.train", str(tmp_path / "train")]
    options += ["--data.evaluation", str(tmp_path / "evaluation"), "--num-epochs", "1"]
    assert main([*options, "--run-dir", str(tmp_path / "run")], job="jft_async") == 0
    scores = json.loads((tmp_path / "run" / "summary.json").read_text())["scores"]["average"]
    third = 1 / 3  # Weights 1/3, 1/3, 1/3 and 1 are prevalences, too.
    assert scores["map100_prevalence"] == pytest.approx((3 * third**2 + 1) / 2)


@pytest.mark.usefixtures("cluster")
def test_corrupt_evaluation_images_are_listed(tmp_path: Path) -> None:
    options = data_options(tmp_path)
    shard = tmp_path / "evaluation" / "evaluation-00000.tar"
    table = ShardIndex.open(str(tmp_path / "evaluation")).table(0)
    payload = bytearray(shard.read_bytes())
    start, size = int(table.offsets[4]), int(table.sizes[4])
    payload[start : start + size] = bytes(size)
    shard.write_bytes(payload)
    run_dir = tmp_path / "run"
    assert main([*options, "--max-steps", "2", "--run-dir", str(run_dir)]) == 0
    lines = (run_dir / "quarantine.jsonl").read_text().splitlines()
    assert [json.loads(line)["key"] for line in lines] == ["000004"]


def test_help_explains_every_field(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        command_line.main("job", SYNC_PRESETS, default="cifar", description="", arguments=["-h"])
    assert caught.value.code == 0
    text = re.sub(r"[\s│]+", " ", capsys.readouterr().out)
    for option, explanation in explained(TrainConfig, prefix="--"):
        assert re.search(rf" {re.escape(option)}[ ,]", text)
        assert explanation in text
    for option in ("--preset", "--config", "--resume", "--no-resume", "--dry-run"):
        assert f" {option} " in text


def explained(config_class: type, *, prefix: str) -> Iterator[tuple[str, str]]:
    """Every option, and the beginning of the docstring under its field."""
    source = textwrap.dedent(inspect.getsource(config_class))
    [tree] = ast.parse(source).body
    assert isinstance(tree, ast.ClassDef)
    types = typing.get_type_hints(config_class)
    for field, below in itertools.pairwise(tree.body):
        if not isinstance(field, ast.AnnAssign):
            continue
        assert isinstance(field.target, ast.Name)
        name = field.target.id
        option = f"{prefix}{name.replace('_', '-')}"
        if dataclasses.is_dataclass(types[name]):
            yield from explained(types[name], prefix=f"{option}.")
        else:
            assert isinstance(below, ast.Expr), f"{option} has no docstring"
            assert isinstance(below.value, ast.Constant)
            yield option, " ".join(str(below.value.value).split()[:4])


@pytest.mark.parametrize("name", MODEL_NAMES)
def test_every_network_is_chosen_by_name_in_both_jobs(name: str) -> None:
    for presets in (SYNC_PRESETS, ASYNC_PRESETS):
        arguments = ["--preset", "cifar", "--model.name", name]
        config = parse(presets, default="paper", description="", arguments=arguments).run
        assert (config.model.name, config.model.width) == (name, 0.25)
        assert config.model.middle_modules == (2 if name == "xception" else 8)


def test_the_same_command_has_the_same_run_directory() -> None:
    config = SYNC_PRESETS["cifar"]
    first = command_line.default_run_dir("job", config)
    assert first == command_line.default_run_dir("job", config)
    assert first != command_line.default_run_dir("job", SYNC_PRESETS["paper"])


@pytest.mark.long
def test_the_literal_command_trains_on_scenes_and_resumes(tmp_path: Path) -> None:
    variables = {
        "HOME": str(tmp_path),
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "RAY_AUTH_TOKEN": os.environ["RAY_AUTH_TOKEN"],
    }
    with LocalHead(num_cpus=2, variables=variables) as head:
        jobs = JobSubmissionClient(head.jobs_address)
        first = submit(head)
        run_dir = wait_for_a_checkpoint(tmp_path)
        log = jobs.get_job_logs(first)
        lines = [line for line in log.splitlines() if " INFO " in line]
        assert "--data.train" in lines[0]
        assert "workers=2 servers=2" in log
        stop(head, first)
        saved = max(record["step"] for record in records(run_dir, "checkpoint"))
        assert saved >= max(record["step"] for record in records(run_dir, "train")) > 0
        second = submit(head)
        log = wait_until(lambda: resumption(jobs.get_job_logs(second)), limit_s=100)
        stop(head, second)
        assert f"step={saved} " in log
        assert json.loads((run_dir / "config.json").read_text())["num_workers"] == 2


def submit(head: LocalHead) -> str:
    """`ray job submit -- python jobs/jft_async.py`, with time to save when it is stopped; the job's
    id.
    """
    patience = json.dumps({"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "60"}})
    command = ["submit", "--no-wait", "--runtime-env-json", patience, "--"]
    words = ray_job(head, *command, "python", "jobs/jft_async.py").split()
    return next(word.strip("'") for word in words if word.startswith("'raysubmit_"))


def stop(head: LocalHead, job: str) -> None:
    """`ray job stop`, which returns when the job has ended."""
    assert "was stopped" in ray_job(head, "stop", job)


def ray_job(head: LocalHead, *arguments: str) -> str:
    """What `ray job` says."""
    ray = str(Path(sys.executable).with_name("ray"))
    finished = subprocess.run(
        [ray, "job", *arguments],
        env={**head.environment, "RAY_ADDRESS": head.jobs_address},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=True,
        text=True,
    )
    return finished.stdout


def resumption(log: str) -> str | None:
    """The line that tells from where the run went on."""
    return next((line for line in log.splitlines() if "run resumed" in line), None)


def wait_for_a_checkpoint(home: Path) -> Path:
    """The run directory, once it holds a checkpoint of trained weights."""

    def find() -> Path | None:
        for metrics in home.glob("xdist-runs/*/metrics.jsonl"):
            if '"checkpoint"' in metrics.read_text():
                return metrics.parent
        return None

    return wait_until(find, limit_s=150)
