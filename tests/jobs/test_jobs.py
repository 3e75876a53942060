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
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import pytest
import webdataset
from imagenet_sync import PRESETS as SYNC_PRESETS
from jft_async import PRESETS as ASYNC_PRESETS
from local_head import LocalHead
from ray.job_submission import JobSubmissionClient
from ray.util.state import list_actors

from datapipe.index import ShardIndex
from datapipe.writer import RawImage, write_shards
from tests.clusters import ROOT, wait_until
from tests.datapipe.small_sets import encode, picture
from tests.small_runs import records, spoil, write_run_data
from xdist import command_line
from xdist.config import TrainConfig
from xdist.model_config import MODEL_NAMES

pytestmark = [pytest.mark.ray, pytest.mark.timeout(240)]

SMALL = ("--model.width", "0.0625", "--model.middle-modules", "0", "--data.image-size", "16")
SMALL_DATA = ("--data.block-size", "4", "--batch-size", "4", "--num-workers", "2")


def data_options(directory: Path) -> list[str]:
    data = write_run_data(directory, single_label=True)
    return ["--data.train", data.train, "--data.evaluation", str(data.evaluation)]


def main(arguments: Sequence[str], *, job: str = "imagenet_sync") -> int:
    """The job's main in this process, on the test run's cluster."""
    presets = SYNC_PRESETS if job == "imagenet_sync" else ASYNC_PRESETS
    options = [*SMALL, *SMALL_DATA, *arguments]
    return command_line.main(job, presets, default="cifar", description="", arguments=options)


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
    [("imagenet_sync", signal.SIGTERM, 143), ("jft_async", signal.SIGINT, 130)],
)
def test_a_signal_ends_the_actors_and_the_run_resumes(
    tmp_path: Path, cluster: LocalHead, job: str, number: int, code: int
) -> None:
    endless = ["--num-epochs", "100000", "--report-every-steps", "1", "--cluster.wait-s", "20"]
    options = [*data_options(tmp_path), *endless, "--run-dir", str(tmp_path / "run")]
    options = [*SMALL, *SMALL_DATA, "--preset", "cifar", *options]
    options += ["--checkpoint.every-samples", "40"]
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
        assert "the same command resumes" in (tmp_path / "log").read_text()
        alive = list_actors(address=cluster.address, filters=[("state", "=", "ALIVE")])
        assert alive == []
    starts = [record["step"] for record in records(tmp_path / "run", "start")]
    assert starts[0] == 0 < starts[1]


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
class TestBadInput:
    """One clear message and exit code 2."""

    def run(self, options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> str:
        assert main([*options, "--run-dir", str(tmp_path / "run")]) == 2
        text = capsys.readouterr().err
        assert "Traceback" not in text
        return text

    def test_a_missing_shard(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        options = data_options(tmp_path)
        (tmp_path / "train" / "train-00001.tar").unlink()
        text = self.run(options, tmp_path, capsys)
        assert "1 shard is in the index but not in storage" in text
        assert "train-00001.tar" in text

    def test_what_was_mended_may_use_the_same_run_directory(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        options = [*data_options(tmp_path), "--max-steps", "2"]
        text = self.run(["--data.train", str(tmp_path / "typo"), *options[2:]], tmp_path, capsys)
        assert "typo" in text
        text = self.run([*options, "--model.num-classes", "3"], tmp_path, capsys)
        assert "set model.num_classes to at least 10" in text
        assert main([*options, "--run-dir", str(tmp_path / "run")]) == 0

    def test_an_empty_folder(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (tmp_path / "empty").mkdir()
        text = self.run(["--data.train", str(tmp_path / "empty")], tmp_path, capsys)
        assert "neither index.json nor *.tar files are here" in text

    def test_a_label_outside_the_range(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        options = [*data_options(tmp_path), "--model.num-classes", "3"]
        text = self.run(options, tmp_path, capsys)
        assert "the model has 3 outputs; set model.num_classes to at least 10" in text

    def test_an_evaluation_set_with_other_labels(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        options = data_options(tmp_path)
        labels = tmp_path / "evaluation" / "labels.json"
        labels.write_text(labels.read_text().replace("label 0", "apple"))
        text = self.run(options, tmp_path, capsys)
        assert "label 0 is 'label 0' in" in text
        train = tmp_path / "train" / "labels.json"
        assert f"pack {tmp_path / 'evaluation'} with --labels {train}" in text

    def test_a_run_is_not_resumed_on_other_data(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        options = [*data_options(tmp_path), "--max-steps", "2"]
        assert main([*options, "--run-dir", str(tmp_path / "run")]) == 0
        manifest = tmp_path / "train" / "index.json"
        value = json.loads(manifest.read_text())
        value["num_samples"] -= value["shards"].pop()["num_samples"]
        manifest.write_text(json.dumps(value))
        text = self.run(options, tmp_path, capsys)
        assert "was trained with another training set" in text

    def test_too_few_samples_for_batch_norm(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        options = [*data_options(tmp_path), "--num-workers", "4", "--batch-size", "4"]
        text = self.run(options, tmp_path, capsys)
        assert "1 images of 16 px, the fewest that are computed together, do not go through" in text

    def test_images_too_small_for_the_network(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        options = data_options(tmp_path)
        arguments = ["--model.name", "inception_v3", "--data.image-size", "48", *options]
        arguments += ["--run-dir", str(tmp_path / "run")]
        code = command_line.main(
            "job", SYNC_PRESETS, default="cifar", description="", arguments=arguments
        )
        assert code == 2
        message = "data.image_size is 48; allowed: at least 75 with inception_v3, or 31 with"
        assert message in capsys.readouterr().err

    def test_truncated_images_beyond_the_budget(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        payload = encode(picture(0))
        images = [RawImage(payload[: len(payload) // 2], "jpg", (0,)) for _ in range(8)]
        directory = str(tmp_path / "broken")
        write_shards(
            images,
            directory=directory,
            labels=None,
            prefix="train",
            samples_per_shard=None,
            shard_bytes=None,
        )
        options = ["--data.train", directory, "--data.evaluation", "None"]
        text = self.run([*options, "--data.max-bad-samples", "3"], tmp_path, capsys)
        assert "data.max_bad_samples allows 3" in text
        assert (tmp_path / "run" / "quarantine.jsonl").exists()
        assert ShardIndex.open(directory).num_samples == 8

    def test_the_budget_of_bad_samples_may_be_raised(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        options = data_options(tmp_path)
        spoil(tmp_path / "train" / "train-00000.tar", num_samples=3)
        options += ["--max-steps", "30", "--data.max-bad-samples"]
        text = self.run([*options, "2"], tmp_path, capsys)
        assert "raise data.max_bad_samples" in text
        assert main([*options, "3", "--run-dir", str(tmp_path / "run")]) == 0

    def test_a_run_directory_in_rays_copy_of_the_working_directory(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        copy = tmp_path / "runtime_resources" / "working_dir_files" / "_ray_pkg_1"
        copy.mkdir(parents=True)
        options = data_options(tmp_path)
        monkeypatch.chdir(copy)
        assert main([*options, "--run-dir", "runs/mine"]) == 2
        text = capsys.readouterr().err
        assert "run_dir is 'runs/mine', relative to the working directory of a Ray job" in text

    def test_more_workers_than_room(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        options = [*data_options(tmp_path), "--cluster.cpus-per-worker", "5"]
        text = self.run(options, tmp_path, capsys)
        assert "2 workers of 5 CPU do not fit: the cluster has 8 CPU" in text

    def test_a_run_directory_that_cannot_be_written(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "file").touch()
        assert main([*data_options(tmp_path), "--run-dir", str(tmp_path / "file" / "run")]) == 2
        assert "cannot be written" in capsys.readouterr().err


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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--num-workers", "0"], "num_workers is 0; allowed: at least 1"),
        (["--num-workes", "2"], "--num-workers"),
        (["--preset", "imagenet"], "invalid choice: 'imagenet'"),
        (["--loss", "hinge"], "softmax"),
        (["--model.name", "alexnet"], "'alexnet' (choose from"),
    ],
)
def test_a_wrong_option_says_what_is_allowed(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        command_line.main("job", SYNC_PRESETS, default="cifar", description="", arguments=options)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_help_explains_every_field(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        command_line.main("job", SYNC_PRESETS, default="cifar", description="", arguments=["-h"])
    assert caught.value.code == 0
    text = re.sub(r"[\s│]+", " ", capsys.readouterr().out)
    for option, explanation in explained(TrainConfig, prefix="--"):
        assert re.search(rf" {re.escape(option)}[ ,]", text)
        assert explanation in text


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
        config = command_line.parse(presets, default="paper", description="", arguments=arguments)
        assert (config.model.name, config.model.width) == (name, 0.25)
        assert config.model.middle_modules == (2 if name == "xception" else 8)


def test_the_same_command_has_the_same_run_directory() -> None:
    config = SYNC_PRESETS["cifar"]
    first = command_line.default_run_dir("job", config)
    assert first == command_line.default_run_dir("job", config)
    assert first != command_line.default_run_dir("job", SYNC_PRESETS["paper"])


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
        stop(jobs, first)
        second = submit(head)
        log = wait_until(lambda: resumption(jobs.get_job_logs(second)), limit_s=100)
        stop(jobs, second)
        assert "step=0 " not in log
        assert json.loads((run_dir / "config.json").read_text())["num_workers"] == 2


def submit(head: LocalHead) -> str:
    """`ray job submit -- python jobs/jft_async.py`; the job's id."""
    ray = str(Path(sys.executable).with_name("ray"))
    finished = subprocess.run(
        [ray, "job", "submit", "--no-wait", "--", "python", "jobs/jft_async.py"],
        env={**head.environment, "RAY_ADDRESS": head.jobs_address},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=True,
        text=True,
    )
    words = finished.stdout.split()
    return next(word.strip("'") for word in words if word.startswith("'raysubmit_"))


def stop(jobs: JobSubmissionClient, job: str) -> None:
    """As `ray job stop` does: returns when it has ended."""
    jobs.stop_job(job)
    wait_until(lambda: jobs.get_job_status(job).is_terminal() or None)


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
