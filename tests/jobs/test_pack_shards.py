"""Packing images from the command line: every kind of source, and their labels."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from datapipe.index import ShardIndex
from datapipe.labels import Label, read_labels
from datapipe.packing import shuffle_images
from datapipe.reader import SampleReader
from datapipe.sources import list_images
from tests.datapipe.small_sources import files_in
from tests.jobs.photos import folder, pack, save_image, write_csv

__all__ = ["folder"]

ROOT = Path(__file__).parents[2]


def packed_labels(directory: Path) -> list[list[str]]:
    """The label names of every packed image, sorted."""
    index = ShardIndex.open(str(directory))
    names = [label.name for label in read_labels(str(directory / "labels.json"))]
    reader = SampleReader(index, block_size=8, max_blocks=2)
    samples = reader.fetch(np.arange(index.num_samples))
    assert all(sample.problem() is None for sample in samples)
    return sorted(
        [names[label] for label in sample.labels] for sample in samples if sample.labels is not None
    )


def test_a_folder_a_class(folder: Path, tmp_path: Path) -> None:
    assert pack(folder, tmp_path / "out") == 0
    assert packed_labels(tmp_path / "out") == [["cat"]] * 3 + [["dog"]] * 2
    expected = (Label(0, "cat", 0.6), Label(1, "dog", 0.4))
    assert read_labels(str(tmp_path / "out" / "labels.json")) == expected


def test_a_tar_of_folders_gives_the_shards_that_the_folder_gives(
    folder: Path, tmp_path: Path
) -> None:
    with tarfile.open(tmp_path / "photos.tar", "w") as tar:
        tar.add(folder, "some/where")
    assert pack(folder, tmp_path / "one") == 0
    assert pack(tmp_path / "photos.tar", tmp_path / "two") == 0
    one, two = (tmp_path / name / "train-00000.tar" for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()


def test_the_index_keeps_the_names_of_the_files(folder: Path, tmp_path: Path) -> None:
    assert pack(folder, tmp_path / "out") == 0
    table = ShardIndex.open(str(tmp_path / "out")).table(0)
    assert {"cat/0.jpg", "dog/0.JPEG"} < {name for name in table.names if name}


def test_what_is_left_out_is_said(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_image(folder / "emu" / "0.bmp", 1)
    save_image(folder / "emu" / "1.bmp", 1)
    assert pack(folder, tmp_path / "out") == 0
    assert "left out: 2 .bmp, 1 .txt\n" in capsys.readouterr().err


def test_a_csv_table_with_one_many_or_no_labels(folder: Path, tmp_path: Path) -> None:
    rows = {"cat/0.jpg": "7", "cat/1.jpg": "pet furry", "dog/0.JPEG": "pet; 7", "dog/1.JPEG": ""}
    table = write_csv(folder / "table.csv", rows)
    assert pack(table, tmp_path / "out") == 0
    assert packed_labels(tmp_path / "out") == [[], ["7"], ["pet", "7"], ["pet", "furry"]]


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ([["big cat", "pet"], ["pet"]], [["big cat", "pet"], ["pet"]]),
        ([3, 4], [["3"], ["4"]]),
        (["a", "a;b"], [["a"], ["a", "b"]]),
    ],
    ids=["lists", "numbers", "strings"],
)
def test_a_parquet_table(
    folder: Path, tmp_path: Path, labels: list[object], expected: list[list[str]]
) -> None:
    paths = ["cat/0.jpg", str(folder / "dog" / "0.JPEG")]
    pq.write_table(pa.table({"path": paths, "labels": labels}), folder / "table.parquet")
    assert pack(folder / "table.parquet", tmp_path / "out") == 0
    assert packed_labels(tmp_path / "out") == expected


@pytest.mark.parametrize("with_names", [False, True])
def test_a_label_map(folder: Path, tmp_path: Path, with_names: bool) -> None:
    labels_of_class = {"cat": ["n2", "n1"], "dog": ["n3", "n1"], "emu": ["n4"]}
    names = {"n1": "animal", "n2": "feline", "n3": "canine", "n4": "bird"}
    value = {"labels_of_class": labels_of_class, "names": names} if with_names else labels_of_class
    (tmp_path / "map.json").write_text(json.dumps(value))
    assert pack(folder, tmp_path / "out", "--label-map", tmp_path / "map.json") == 0
    found = {tuple(labels) for labels in packed_labels(tmp_path / "out")}
    if with_names:
        assert found == {("n2 feline", "n1 animal"), ("n3 canine", "n1 animal")}
    else:
        assert found == {("n2", "n1"), ("n3", "n1")}


def test_an_evaluation_set_takes_ids_and_weights_of_the_training_set(
    folder: Path, tmp_path: Path
) -> None:
    assert pack(folder, tmp_path / "train") == 0
    labels = tmp_path / "train" / "labels.json"
    save_image(tmp_path / "held-out" / "dog" / "9.png", 50)
    assert pack(tmp_path / "held-out", tmp_path / "test", "--labels", labels) == 0
    assert packed_labels(tmp_path / "test") == [["dog"]]
    assert (tmp_path / "test" / "labels.json").read_bytes() == labels.read_bytes()


def test_limit_takes_a_seeded_choice_and_keeps_all_classes(folder: Path, tmp_path: Path) -> None:
    for name, seed in (("one", 1), ("again", 1), ("other", 2)):
        assert pack(folder, tmp_path / name, "--limit", 2, "--seed", seed) == 0
        assert len(packed_labels(tmp_path / name)) == 2
        assert len(read_labels(str(tmp_path / name / "labels.json"))) == 2
    one, again, other = (
        (tmp_path / name / "train-00000.tar").read_bytes() for name in ("one", "again", "other")
    )
    assert one == again != other


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def test_a_truncated_image_stops_or_is_listed(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    truncate(folder / "cat" / "1.jpg")
    assert pack(folder, tmp_path / "out") == 2
    assert re.search(r"error: cat/1\.jpg: .*truncated.*; repair it", capsys.readouterr().err)
    assert not (tmp_path / "out" / "index.json").exists()
    assert pack(folder, tmp_path / "out", "--skip-bad") == 0
    assert re.search(r"skipped cat/1\.jpg: .*truncated", capsys.readouterr().err)
    assert packed_labels(tmp_path / "out") == [["cat"]] * 2 + [["dog"]] * 2
    labels = read_labels(str(tmp_path / "out" / "labels.json"))
    assert [label.weight for label in labels] == [0.5, 0.5]  # of what was packed


def test_packing_goes_on_where_it_was(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    last = list_images(folder).images[-1].path
    noise = Image.effect_noise((700, 700), 90)
    noise.save(folder / "cat" / "large-0.png", compress_level=0)
    for number in range(1, 7):  # two shards of a megabyte before the last image
        shutil.copy(folder / "cat" / "large-0.png", folder / "cat" / f"large-{number}.png")
    truncate(last)
    seed = next(
        seed
        for seed in range(100)
        if shuffle_images(list_images(folder).images, seed=seed, limit=None)[-1].path == last
    )
    command = [folder, tmp_path / "out", "--seed", seed, "--shard-mb", 1, "--num-processes", 1]
    assert pack(*command) == 2
    shards = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.tar")}
    assert len(shards) == 2
    assert pack(*command[:4], "--shard-mb", 2) == 2
    other = "an unfinished packing of another command: size of a shard (--shard-mb) in bytes was 1"
    assert other in capsys.readouterr().err
    assert pack(*command, "--skip-bad") == 0
    assert len(packed_labels(tmp_path / "out")) == 11
    assert {path: path.stat().st_mtime_ns for path in shards} == shards


def test_parts_are_put_together_by_finish(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert pack(folder, tmp_path / "one") == 0
    assert pack(folder, tmp_path / "two", "--part", "1/2") == 0
    assert "give the same command with --finish in place of --part" in capsys.readouterr().out
    assert not (tmp_path / "two" / "index.json").exists()
    assert pack(folder, tmp_path / "two", "--part", "2/2") == 0
    assert pack(folder, tmp_path / "two", "--finish") == 0
    assert files_in(tmp_path / "one") == files_in(tmp_path / "two")


@pytest.mark.ray
@pytest.mark.timeout(240)
@pytest.mark.usefixtures("cluster")
def test_a_cluster_gives_what_one_machine_gives(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(3):
        Image.effect_noise((700, 700), 90).save(folder / f"cat/{number}.png", compress_level=0)
    options = ("--shard-mb", 1, "--prefix", "part")
    assert pack(folder, tmp_path / "one", *options, "--num-processes", 1) == 0
    assert pack(folder, tmp_path / "two", *options, "--ray") == 0
    assert files_in(tmp_path / "one") == files_in(tmp_path / "two")
    assert len(list((tmp_path / "two").glob("*.tar"))) == 2
    truncate(folder / "cat" / "1.jpg")
    assert pack(folder, tmp_path / "three", *options, "--ray") == 2
    assert re.search(r"error: cat/1\.jpg: .*truncated.*; repair it", capsys.readouterr().err)


def tar_of(path: Path, images: dict[str, Path]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, image in images.items():
            tar.add(image, name)
    return path


def test_the_archives_of_ilsvrc_are_packed_as_they_are(folder: Path, tmp_path: Path) -> None:
    cats = {f"n02123045_{i}.JPEG": folder / "cat" / f"{i}.jpg" for i in range(3)}
    dogs = {f"n02085620_{i}.JPEG": folder / "dog" / f"{i}.JPEG" for i in range(2)}
    tars = {"n02123045.tar": cats, "n02085620.tar": dogs}
    source = tar_of(
        tmp_path / "train.tar",
        {name: tar_of(tmp_path / name, images) for name, images in tars.items()},
    )
    assert pack(source, tmp_path / "train", "--recipe", "ilsvrc-train") == 0
    assert packed_labels(tmp_path / "train") == [["n02085620"]] * 2 + [["n02123045"]] * 3
    images = {f"ILSVRC2012_val_0000000{i}.JPEG": folder / f"cat/{i}.jpg" for i in (1, 2)}
    (tmp_path / "synsets.txt").write_text("n02123045\nn02085620\n")
    recipe = ("--recipe", "ilsvrc-validation", "--ground-truth", tmp_path / "synsets.txt")
    labels = ("--labels", tmp_path / "train" / "labels.json")
    assert pack(tar_of(tmp_path / "val.tar", images), tmp_path / "val", *recipe, *labels) == 0
    assert packed_labels(tmp_path / "val") == [["n02085620"], ["n02123045"]]


def test_open_images_are_packed_with_several_labels(folder: Path, tmp_path: Path) -> None:
    lines = [
        "ImageID,Source,LabelName,Confidence",
        "0,verification,/m/b,1",
        "0,verification,/m/a,1",
        "1,verification,/m/a,1",
    ]
    (tmp_path / "labels.csv").write_text("\n".join(lines))
    recipe = ("--recipe", "open-images", "--image-labels", tmp_path / "labels.csv")
    assert pack(folder / "cat", tmp_path / "out", *recipe) == 0
    assert packed_labels(tmp_path / "out") == [["/m/a"], ["/m/a", "/m/b"]]


def test_images_may_be_encoded_anew(folder: Path, tmp_path: Path) -> None:
    Image.new("RGB", (80, 40)).save(folder / "dog" / "large.png")
    options = ("--reencode-quality", 90, "--reencode-long-side", 20)
    assert pack(folder, tmp_path / "out", *options) == 0
    table = ShardIndex.open(str(tmp_path / "out")).table(0)
    sizes = sorted(zip(table.widths.tolist(), table.heights.tolist(), strict=True))
    assert sizes == [(20, 10), *[(20, 20)] * 5]
    assert "dog/large.png" in table.names


def test_the_real_command_line(folder: Path, tmp_path: Path) -> None:
    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "jobs/pack_shards.py", *map(str, arguments)],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=50,
            check=False,
        )

    done = run(folder, tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("packed 5 images with 2 labels into 1 shards")
    wrong = run(folder, tmp_path / "out2", "--limit", 0)
    assert wrong.returncode == 2
    assert "--limit is 0; allowed: at least 1" in wrong.stderr
    assert "Traceback" not in wrong.stderr


def test_real_images_with_wordnet_labels(tmp_path: Path, shared_data: Path) -> None:
    label_map = shared_data / "cifar10_labels.json"
    source = shared_data / "cifar10-test.tar"
    assert pack(source, tmp_path / "out", "--label-map", label_map, "--limit", 300) == 0
    labels = read_labels(str(tmp_path / "out" / "labels.json"))
    assert len(labels) == 43
    assert {label.name: label.weight for label in labels}["n00001740 entity"] == 1.0
    assert all("n00001740 entity" in names for names in packed_labels(tmp_path / "out"))


def test_ilsvrc_file_names_name_the_class(tmp_path: Path, shared_data: Path) -> None:
    assert pack(shared_data / "imagenet-sample", tmp_path / "out", "--limit", 5) == 0
    assert len(read_labels(str(tmp_path / "out" / "labels.json"))) > 100
