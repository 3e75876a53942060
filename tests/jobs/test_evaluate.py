"""jobs/evaluate.py on a real run, and the one line that it says of a mistake."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import evaluate
import numpy as np
import pytest
from local_head import LocalHead

from datapipe.index import ShardIndex
from datapipe.labels import Label, write_labels
from datapipe.writer import RawImage, write_shards
from tests.clusters import ROOT
from tests.datapipe.small_sets import encode, picture
from tests.small_runs import NUM_LABELS, final, run, small_config, spoil
from xdist import checkpoint
from xdist.config import TrainConfig
from xdist.evaluation_config import EvaluationConfig
from xdist.summary import Summary

pytestmark = [pytest.mark.ray, pytest.mark.timeout(240), pytest.mark.usefixtures("cluster")]

NUM_IMAGES = 30


@dataclass(frozen=True)
class TrainedRun:
    directory: Path
    config: TrainConfig
    summary: Summary

    @property
    def evaluation_set(self) -> Path:
        return Path(str(self.config.data.evaluation))


def trained(directory: Path, strategy: str) -> TrainedRun:
    """A run of a few updates, scored in eight batches."""
    evaluation = EvaluationConfig(batch_size=4)
    config = small_config(
        directory, strategy=strategy, is_scored=True, max_steps=6, evaluation=evaluation
    )
    return TrainedRun(directory / "run", config, run(config, directory / "run"))


@pytest.fixture(scope="module")
def asynchronous(tmp_path_factory: pytest.TempPathFactory) -> TrainedRun:
    return trained(tmp_path_factory.mktemp("asynchronous"), "push_pull")


@pytest.fixture(scope="module")
def synchronous(tmp_path_factory: pytest.TempPathFactory) -> TrainedRun:
    return trained(tmp_path_factory.mktemp("synchronous"), "all_reduce")


def main(*arguments: object) -> int:
    return evaluate.main([str(argument) for argument in arguments])


def result_in(directory: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((directory / "evaluation.json").read_text())
    return value


def rows_in(directory: Path, weights: str = "average") -> list[dict[str, str]]:
    with (directory / f"evaluation-{weights}-weights.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_one_and_two_workers_write_the_same_bytes(asynchronous: TrainedRun, tmp_path: Path) -> None:
    measures = ("--measure", "top_k", "map", "map_image_wise", "--weights", "both")
    for number in (1, 2, 100):
        output = tmp_path / str(number)
        options = ("--num-workers", number, "--output", output)
        assert main(asynchronous.directory, *measures, *options) == 0
    names = ["evaluation-average-weights.csv", "evaluation-raw-weights.csv", "evaluation.json"]
    assert sorted(path.name for path in (tmp_path / "1").iterdir()) == names
    for name in names:
        contents = {(tmp_path / number / name).read_bytes() for number in ("1", "2", "100")}
        assert len(contents) == 1, name
    scores = result_in(tmp_path / "1")["scores"]
    assert set(scores) == {"average", "raw"}
    assert set(scores["raw"]) == {
        "top1", "top5", "map100", "map100_prevalence", "map100_image_wise",
    }  # fmt: skip


@pytest.mark.parametrize("strategy", ["asynchronous", "synchronous"])
def test_the_scores_of_a_run_come_again(
    strategy: str, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    """The driver's, into the run directory, with two parts instead of one."""
    scored: TrainedRun = request.getfixturevalue(strategy)
    arguments = (scored.directory, "--weights", "both", "--num-workers", 2)
    assert main(*arguments) == 0
    result = result_in(scored.directory)
    assert result["scores"] == scored.summary.scores
    assert result["checkpoint"] == final(scored.directory).url
    assert (result["step"], result["num_images"]) == (scored.summary.step, NUM_IMAGES)
    shown = capsys.readouterr().out
    for name, value in scored.summary.scores["average"].items():
        assert name in shown
        assert f"{value:.4f}" in shown
    assert f"{NUM_IMAGES} images; 0 skipped, 0 not decoded" in shown


def test_the_csv_adds_up_to_the_score(asynchronous: TrainedRun, tmp_path: Path) -> None:
    assert main(asynchronous.directory, "--output", tmp_path) == 0
    rows = rows_in(tmp_path)
    assert [(row["id"], row["name"]) for row in rows] == [
        (str(i), f"label {i}") for i in range(NUM_LABELS)
    ]
    positives = np.array([int(row["num_positives"]) for row in rows])
    index = ShardIndex.open(str(asynchronous.evaluation_set))
    assert (positives / NUM_IMAGES).tolist() == pytest.approx(index.label_frequencies().tolist())
    weights = np.array([float(row["weight"]) for row in rows])
    precisions = np.array([float(row["average_precision"]) for row in rows])
    expected = (weights * precisions).sum() / weights.sum()
    assert result_in(tmp_path)["scores"]["average"]["map100"] == pytest.approx(expected)


def test_the_csv_of_accuracies_adds_up_to_the_score(
    synchronous: TrainedRun, tmp_path: Path
) -> None:
    assert main(synchronous.directory, "--output", tmp_path) == 0
    rows = [row for row in rows_in(tmp_path) if row["top1"]]
    assert 0 < len(rows) < NUM_LABELS  # One label an image: some have none.
    hits = sum(int(row["num_positives"]) * float(row["top1"]) for row in rows)
    assert result_in(tmp_path)["scores"]["average"]["top1"] == pytest.approx(hits / NUM_IMAGES)


def test_one_checkpoint_of_a_run(asynchronous: TrainedRun, tmp_path: Path) -> None:
    url = checkpoint.checkpoint_url(str(asynchronous.directory), 0)
    assert main(url, "--output", tmp_path) == 0
    result = result_in(tmp_path)
    assert (result["checkpoint"], result["step"]) == (url, 0)


def test_another_label_space_is_scored_on_the_intersection_and_says_so(
    asynchronous: TrainedRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ["label 4", "yak", "label 8", "label 1"]
    images = [
        RawImage(encode(picture(i)), "jpg", (i % 4, *([2] if i % 4 < 2 else []))) for i in range(9)
    ]
    write_shards(
        images,
        directory=str(tmp_path / "other"),
        labels=[Label(i, name, 1.0) for i, name in enumerate(names)],
        prefix="other",
        samples_per_shard=None,
        shard_bytes=None,
    )
    (tmp_path / "w.csv").write_text("label,weight\nlabel 1,3\n4,1\nlabel 0,1\n")
    options = ("--data", tmp_path / "other", "--class-weights", tmp_path / "w.csv")
    assert main(asynchronous.directory, *options, "--output", tmp_path) == 0
    result = result_in(tmp_path)
    assert (result["num_outputs"], result["num_outputs_scored"]) == (NUM_LABELS, 2)
    assert result["num_labels_left_out"] == 2 + 7  # yak and label 8.
    assert result["num_without_labels"] == 4  # Two of yak and label 8, two of label 8.
    assert result["class_weights"] == str(tmp_path / "w.csv")
    rows = [(row["id"], row["num_positives"], row["weight"]) for row in rows_in(tmp_path)]
    assert rows == [("1", "2", "3.0"), ("4", "3", "1.0")]
    assert (
        "2 of 10 outputs scored; 9 labels of the images are outside of these"
        in capsys.readouterr().out
    )


def test_skipped_and_corrupt_images_are_counted(asynchronous: TrainedRun, tmp_path: Path) -> None:
    shutil.copytree(asynchronous.evaluation_set, tmp_path / "data")
    spoil(tmp_path / "data" / "evaluation-00000.tar", num_samples=2)
    (tmp_path / "skip.txt").write_text("000005\n000007\n000011\n")
    options = ("--data", tmp_path / "data", "--skip", tmp_path / "skip.txt", "--num-workers", 2)
    assert main(asynchronous.directory, *options, "--output", tmp_path) == 0
    result = result_in(tmp_path)
    counts = [result[name] for name in ("num_images", "num_skipped", "num_corrupt")]
    assert counts == [NUM_IMAGES - 5, 3, 2]


def test_bad_samples_have_one_budget_whatever_the_parts(
    asynchronous: TrainedRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(asynchronous.evaluation_set, tmp_path / "data")
    table = ShardIndex.open(str(tmp_path / "data")).table(0)
    with (tmp_path / "data" / "evaluation-00000.tar").open("r+b") as shard:
        for row in (0, NUM_IMAGES - 1):  # One for each part.
            shard.seek(int(table.offsets[row]))
            shard.write(bytes(int(table.sizes[row])))
    data = replace(asynchronous.config.data, evaluation=str(tmp_path / "data"), max_bad_samples=1)
    run_dir = copied(asynchronous, tmp_path, replace(asynchronous.config, data=data))
    for number in (1, 2):
        assert main(run_dir, "--num-workers", number) == 2
        assert "2 corrupt samples, data.max_bad_samples allows 1" in one_error(capsys)


def copied(scored: TrainedRun, directory: Path, config: TrainConfig) -> Path:
    """A run directory with the last checkpoint of that run, and another configuration."""
    found = final(scored.directory)
    url = checkpoint.checkpoint_url(str(directory / "run"), 1)
    shutil.copytree(found.url, url)
    checkpoint.publish(url, replace(found.manifest, config=config.to_json()))
    return directory / "run"


def test_training_labels_that_have_gone_can_be_given(
    asynchronous: TrainedRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = replace(asynchronous.config.data, train=str(tmp_path / "gone"))
    run_dir = copied(asynchronous, tmp_path, replace(asynchronous.config, data=data))
    assert main(run_dir) == 2
    error = one_error(capsys)
    assert "MAP weights a class by its training frequency" in error
    assert "give --class-weights or --labels" in error
    assert main(run_dir, "--measure", "top_k") == 0
    assert {row["weight"] for row in rows_in(run_dir)} == {""}
    assert main(run_dir, "--labels", asynchronous.evaluation_set / "labels.json") == 0
    assert rows_in(run_dir)[3]["name"] == "label 3"
    assert result_in(run_dir)["scores"]["average"] == asynchronous.summary.scores["average"]


def one_error(capsys: pytest.CaptureFixture[str]) -> str:
    text = capsys.readouterr().err
    assert "Traceback" not in text
    [error] = [line for line in text.splitlines() if line.startswith("error: ")]
    return error


def mistake_no_run(_: TrainedRun, tmp_path: Path) -> list[object]:
    return [tmp_path / "typo"]


def mistake_no_shards(scored: TrainedRun, tmp_path: Path) -> list[object]:
    return [scored.directory, "--data", tmp_path / "typo"]


def mistake_damaged(scored: TrainedRun, tmp_path: Path) -> list[object]:
    run_dir = copied(scored, tmp_path, scored.config)
    [url] = (run_dir / "checkpoints").iterdir()
    next(url.glob("range-*")).write_bytes(b"")
    return [url]


def mistake_damaged_run(scored: TrainedRun, tmp_path: Path) -> list[object]:
    [url] = mistake_damaged(scored, tmp_path)
    return [Path(str(url)).parents[1]]


def mistake_other_version(scored: TrainedRun, tmp_path: Path) -> list[object]:
    run_dir = copied(scored, tmp_path, scored.config)
    [found] = [checkpoint.latest(str(run_dir))]
    assert found is not None
    config = {**found.manifest.config, "colour": "red"}
    checkpoint.publish(found.url, replace(found.manifest, config=config))
    return [run_dir]


def mistake_no_output(scored: TrainedRun, tmp_path: Path) -> list[object]:
    shutil.copytree(final(scored.directory).url, tmp_path / "step-000000000001")
    return [tmp_path / "step-000000000001"]


def mistake_no_data(scored: TrainedRun, tmp_path: Path) -> list[object]:
    data = replace(scored.config.data, evaluation=None)
    return [copied(scored, tmp_path, replace(scored.config, data=data))]


def mistake_weights_file(scored: TrainedRun, tmp_path: Path) -> list[object]:
    return [scored.directory, "--class-weights", tmp_path / "none.csv"]


def mistake_skip_file(scored: TrainedRun, tmp_path: Path) -> list[object]:
    (tmp_path / "blacklist.txt").write_text("5\n")
    return [scored.directory, "--skip", tmp_path / "blacklist.txt"]


def mistake_labels(scored: TrainedRun, tmp_path: Path) -> list[object]:
    write_labels(str(tmp_path / "labels.json"), [Label(0, "yak", 1.0)])
    return [scored.directory, "--labels", tmp_path / "labels.json"]


def mistake_cpus(scored: TrainedRun, _: Path) -> list[object]:
    return [scored.directory, "--cpus-per-worker", 0]


def mistake_too_many_cpus(scored: TrainedRun, _: Path) -> list[object]:
    return [scored.directory, "--cpus-per-worker", 64]


def mistake_output(scored: TrainedRun, tmp_path: Path) -> list[object]:
    (tmp_path / "file").touch()
    return [scored.directory, "--output", tmp_path / "file"]


@pytest.mark.parametrize(
    ("mistake", "text"),
    [
        (mistake_no_run, "typo: neither a checkpoint nor a run directory with one that verifies"),
        (mistake_no_shards, "typo: neither index.json nor *.tar files are here"),
        (mistake_damaged, ".safetensors: 0 bytes, which are not the"),
        (mistake_damaged_run, "run: neither a checkpoint nor a run directory with one that"),
        (mistake_other_version, "unknown fields colour; use the version of this program that"),
        (mistake_no_output, "lies in no run directory; give --output a directory"),
        (mistake_no_data, "the run has no data.evaluation; give --data"),
        (mistake_weights_file, "none.csv: class weights cannot be read"),
        (mistake_skip_file, "none of its 1 lines names one of the 30 samples"),
        (mistake_labels, "nothing to score: none of the 10 outputs"),
        (mistake_cpus, "cluster.cpus_per_worker is 0.0; allowed: at least 0.0001"),
        (mistake_too_many_cpus, "no node of the cluster has the 64 CPU and 0 GPU of a worker"),
        (mistake_output, "file cannot be written"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    asynchronous: TrainedRun,
    tmp_path: Path,
    mistake: Callable[[TrainedRun, Path], list[object]],
    text: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(*mistake(asynchronous, tmp_path)) == 2
    assert text in one_error(capsys)


def test_a_run_without_average_is_scored_on_raw_weights(
    asynchronous: TrainedRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    optimizer = replace(asynchronous.config.optimizer, average_half_life_samples=None)
    config = replace(asynchronous.config, optimizer=optimizer)
    run_dir = copied(asynchronous, tmp_path, config)
    assert main(run_dir, "--weights", "both") == 2
    assert "the run keeps no average of its weights" in one_error(capsys)
    assert main(run_dir) == 0
    assert result_in(run_dir)["scores"] == {"raw": asynchronous.summary.scores["raw"]}


def test_the_real_command_line_starts_ray_for_itself(
    asynchronous: TrainedRun, tmp_path: Path, cluster: LocalHead
) -> None:
    """Where there is no cluster: RAY_ADDRESS names none, and Ray's directory is another."""
    environment = {
        name: value
        for name, value in cluster.environment.items()
        if name not in ("RAY_ADDRESS", "XDIST_LOCAL_HEAD")
    }
    environment |= {"PYTHONPATH": str(ROOT), "RAY_ADDRESS": "local"}

    def start(*arguments: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "jobs/evaluate.py", *map(str, arguments)],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    options = ("--num-workers", 2, "--output", tmp_path)
    done = start(asynchronous.directory, *options)
    assert done.returncode == 0, done.stderr
    assert "map100" in done.stdout
    assert result_in(tmp_path)["scores"]["average"] == asynchronous.summary.scores["average"]
    wrong = start(asynchronous.directory, "--num-workers", 0)
    assert wrong.returncode == 2
    assert "--num-workers is 0; allowed: at least 1" in wrong.stderr
    assert "Traceback" not in wrong.stderr
