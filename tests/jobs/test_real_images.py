"""Both jobs on real photographs, packed by the real packer."""

from __future__ import annotations

import json
from pathlib import Path

import pack_shards
import pytest
from imagenet_sync import PRESETS as SYNC_PRESETS
from jft_async import PRESETS as ASYNC_PRESETS

from xdist import command_line

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.timeout(300),
    pytest.mark.usefixtures("cluster"),
]


def pack(source: Path, output: Path, *options: str) -> str:
    assert pack_shards.main([str(source), str(output), *options]) == 0
    return str(output)


def test_the_synchronous_preset_trains_on_cifar(tmp_path: Path, shared_data: Path) -> None:
    train = pack(shared_data / "cifar10-train.tar", tmp_path / "train", "--limit", "320")
    labels = ("--labels", f"{train}/labels.json", "--limit", "64")
    test = pack(shared_data / "cifar10-test.tar", tmp_path / "test", *labels)
    options = ["--data.train", train, "--data.evaluation", test, "--num-workers", "2"]
    run_dir = tmp_path / "run"
    code = command_line.main(
        "imagenet_sync",
        SYNC_PRESETS,
        default="cifar",
        description="",
        arguments=[*options, "--num-epochs", "2", "--run-dir", str(run_dir)],
    )
    assert code == 0
    summary = json.loads((run_dir / "summary.json").read_text())
    assert (summary["step"], summary["num_samples"]) == (10, 640)


def test_the_asynchronous_preset_trains_on_cifar_with_wordnet_labels(
    tmp_path: Path, shared_data: Path
) -> None:
    label_map = ("--label-map", str(shared_data / "cifar10_labels.json"))
    train = pack(
        shared_data / "cifar10-train.tar", tmp_path / "train", *label_map, "--limit", "320"
    )
    labels = (*label_map, "--labels", f"{train}/labels.json", "--limit", "64")
    test = pack(shared_data / "cifar10-test.tar", tmp_path / "test", *labels)
    options = ["--data.train", train, "--data.evaluation", test, "--num-workers", "2"]
    run_dir = tmp_path / "run"
    code = command_line.main(
        "jft_async",
        ASYNC_PRESETS,
        default="cifar",
        description="",
        arguments=[*options, "--num-epochs", "2", "--run-dir", str(run_dir)],
    )
    assert code == 0
    scores = json.loads((run_dir / "summary.json").read_text())["scores"]["average"]
    assert 0 < scores["map100_prevalence"] < scores["map100"] <= 1


@pytest.mark.parametrize(
    ("job", "options"),
    [
        ("imagenet_sync", ["--batch-size", "4"]),
        ("jft_async", ["--batch-size", "2", "--model.fc"]),
    ],
)
def test_the_full_network_trains_at_299_pixels(
    tmp_path: Path, shared_data: Path, job: str, options: list[str]
) -> None:
    source = shared_data / "imagenet-sample"
    label_map = ("--label-map", str(shared_data / "imagenet_labels.json"))
    is_sync = job == "imagenet_sync"
    train = pack(source, tmp_path / "train", *(() if is_sync else label_map), "--limit", "16")
    run_dir = tmp_path / "run"
    sizes = ["--num-workers", "2", "--max-steps", "2", "--run-dir", str(run_dir)]
    code = command_line.main(
        job,
        SYNC_PRESETS if is_sync else ASYNC_PRESETS,
        default="paper",
        description="",
        arguments=["--data.train", train, "--data.evaluation", "None", *options, *sizes],
    )
    assert code == 0
    manifest = json.loads(
        next((run_dir / "checkpoints").glob("step-*02/manifest.json")).read_text()
    )
    size = sum(part["stop"] - part["start"] for part in manifest["parts"])
    assert size == (22_855_952 if is_sync else 55_639_952)
