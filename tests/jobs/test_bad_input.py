"""What a user can get wrong: one clear message and exit code 2."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from imagenet_sync import PRESETS as SYNC_PRESETS

from datapipe.index import ShardIndex
from datapipe.writer import RawImage, write_shards
from tests.datapipe.small_sets import encode, picture
from tests.jobs.small_jobs import data_options, main
from tests.small_runs import spoil
from xdist import command_line

pytestmark = [pytest.mark.ray, pytest.mark.timeout(240), pytest.mark.usefixtures("cluster")]


def refused(options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """What a job that ends with code 2 says."""
    assert main([*options, "--run-dir", str(tmp_path / "run")]) == 2
    text = capsys.readouterr().err
    assert "Traceback" not in text
    return text


def test_a_missing_shard(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = data_options(tmp_path)
    (tmp_path / "train" / "train-00001.tar").unlink()
    text = refused(options, tmp_path, capsys)
    assert "1 shard is in the index but not in storage" in text
    assert "train-00001.tar" in text


def test_what_was_mended_may_use_the_same_run_directory(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [*data_options(tmp_path), "--max-steps", "2"]
    text = refused(["--data.train", str(tmp_path / "typo"), *options[2:]], tmp_path, capsys)
    assert "typo" in text
    text = refused([*options, "--model.num-classes", "3"], tmp_path, capsys)
    assert "set model.num_classes to at least 10" in text
    assert main([*options, "--run-dir", str(tmp_path / "run")]) == 0


def test_an_empty_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    text = refused(["--data.train", str(tmp_path / "empty")], tmp_path, capsys)
    assert "neither index.json nor *.tar files are here" in text


def test_a_label_outside_the_range(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = [*data_options(tmp_path), "--model.num-classes", "3"]
    text = refused(options, tmp_path, capsys)
    assert "the model has 3 outputs; set model.num_classes to at least 10" in text


def test_an_evaluation_set_with_other_labels(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = data_options(tmp_path)
    labels = tmp_path / "evaluation" / "labels.json"
    labels.write_text(labels.read_text().replace("label 0", "apple"))
    text = refused(options, tmp_path, capsys)
    assert "label 0 is 'label 0' in" in text
    train = tmp_path / "train" / "labels.json"
    assert f"pack {tmp_path / 'evaluation'} with --labels {train}" in text


def test_a_run_is_not_resumed_on_other_data(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [*data_options(tmp_path), "--max-steps", "2"]
    assert main([*options, "--run-dir", str(tmp_path / "run")]) == 0
    manifest = tmp_path / "train" / "index.json"
    value = json.loads(manifest.read_text())
    value["num_samples"] -= value["shards"].pop()["num_samples"]
    manifest.write_text(json.dumps(value))
    text = refused(options, tmp_path, capsys)
    assert "was trained with another training set" in text


def test_too_few_samples_for_batch_norm(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = [*data_options(tmp_path), "--num-workers", "4", "--batch-size", "4"]
    text = refused(options, tmp_path, capsys)
    assert "1 images of 16 px, the fewest that are computed together, do not go through" in text


def test_more_parts_than_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--num-workers", "2", "--batch-size", "4", "--compute.accumulation-steps", "3"]
    text = refused([*data_options(tmp_path), *sizes], tmp_path, capsys)
    assert "compute.accumulation_steps is 3; allowed: at most 2, the images of a worker" in text


def test_images_too_small_for_the_network(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
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
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
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
    text = refused([*options, "--data.max-bad-samples", "3"], tmp_path, capsys)
    assert "data.max_bad_samples allows 3" in text
    assert (tmp_path / "run" / "quarantine.jsonl").exists()
    assert ShardIndex.open(directory).num_samples == 8


def test_the_budget_of_bad_samples_may_be_raised(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = data_options(tmp_path)
    spoil(tmp_path / "train" / "train-00000.tar", num_samples=3)
    options += ["--max-steps", "30", "--data.max-bad-samples"]
    text = refused([*options, "2"], tmp_path, capsys)
    assert "raise data.max_bad_samples" in text
    assert main([*options, "3", "--run-dir", str(tmp_path / "run")]) == 0


def test_a_run_directory_in_rays_copy_of_the_working_directory(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "runtime_resources" / "working_dir_files" / "_ray_pkg_1"
    copy.mkdir(parents=True)
    options = data_options(tmp_path)
    monkeypatch.chdir(copy)
    assert main([*options, "--run-dir", "runs/mine"]) == 2
    text = capsys.readouterr().err
    assert "run_dir is 'runs/mine', relative to the working directory of a Ray job" in text


def test_more_workers_than_room(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = [*data_options(tmp_path), "--cluster.cpus-per-worker", "5"]
    text = refused(options, tmp_path, capsys)
    assert "2 workers of 5 CPU do not fit: the cluster has 8 CPU" in text


def test_a_run_directory_that_cannot_be_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert main([*data_options(tmp_path), "--run-dir", str(tmp_path / "file" / "run")]) == 2
    assert "cannot be written" in capsys.readouterr().err


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
