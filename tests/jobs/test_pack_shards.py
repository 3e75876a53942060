"""Packing images from the command line: every kind of source, labels, and the user's mistakes."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pack_shards
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pack_shards import PackConfig
from PIL import Image

from datapipe.index import ShardIndex
from datapipe.labels import Label, read_labels
from datapipe.packing import shuffle_images
from datapipe.reader import SampleReader
from datapipe.sources import list_images
from tests.datapipe.small_sources import files_in

ROOT = Path(__file__).parents[2]


def save_image(path: Path, colour: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (24, 24), (colour, 90, 90)).save(path)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three cats and two dogs in folders of their own, and a file that is no image."""
    root = tmp_path / "photos"
    for number in range(3):
        save_image(root / "cat" / f"{number}.jpg", 10 * number)
    for number in range(2):
        save_image(root / "dog" / f"{number}.JPEG", 100 + 10 * number)
    (root / "cat" / "notes.txt").write_text("not an image")
    return root


def pack(*arguments: object) -> int:
    return pack_shards.main([str(argument) for argument in arguments])


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


def write_csv(path: Path, rows: dict[str, str]) -> Path:
    lines = [f'{image},"{labels}"' for image, labels in rows.items()]
    path.write_text("\n".join(["path,labels", *lines]) + "\n")
    return path


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


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"num_processes": 0}, "--num-processes is 0; allowed: at least 1"),
        ({"part": "3/2"}, "--part is '3/2'; allowed: i/n with i from 1 to n"),
        ({"part": "1/2", "finish": True}, "--part and --finish: give --finish alone"),
        ({"ray": True, "finish": True}, "--ray and --finish: "),
        ({"ray": True, "num_processes": 2}, "--ray and --num-processes: "),
        ({"reencode_long_side": 9}, "--reencode-long-side is given without --reencode-quality"),
        ({"meta": Path("meta.mat")}, "--meta belongs to --recipe ilsvrc-validation"),
        ({"recipe": "open-images"}, "--recipe open-images needs --image-labels"),
    ],
)
def test_options_that_exclude_each_other_are_refused(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        PackConfig(source=Path("photos"), output="out", **changes)


def mistake_empty(_: Path, tmp_path: Path) -> list[object]:
    (tmp_path / "empty").mkdir()
    return [tmp_path / "empty", tmp_path / "out"]


def mistake_no_class(folder: Path, tmp_path: Path) -> list[object]:
    save_image(folder / "loose.jpg", 1)
    return [folder, tmp_path / "out"]


def mistake_compressed(folder: Path, tmp_path: Path) -> list[object]:
    with tarfile.open(tmp_path / "photos.tar.gz", "w:gz") as tar:
        tar.add(folder, "photos")
    return [tmp_path / "photos.tar.gz", tmp_path / "out"]


def mistake_columns(folder: Path, tmp_path: Path) -> list[object]:
    (folder / "table.csv").write_text("file,labels\na.jpg,3\n")
    return [folder / "table.csv", tmp_path / "out"]


def mistake_path(folder: Path, tmp_path: Path) -> list[object]:
    return [write_csv(folder / "table.csv", {"cat/77.jpg": "1"}), tmp_path / "out"]


def mistake_map(folder: Path, tmp_path: Path) -> list[object]:
    (tmp_path / "map.json").write_text('{"cat": ["animal"]}')
    return [folder, tmp_path / "out", "--label-map", tmp_path / "map.json"]


def mistake_map_form(folder: Path, tmp_path: Path) -> list[object]:
    (tmp_path / "map.json").write_text("[1, 2]")
    return [folder, tmp_path / "out", "--label-map", tmp_path / "map.json"]


def mistake_map_letters(folder: Path, tmp_path: Path) -> list[object]:
    (tmp_path / "map.json").write_text('{"cat": "animal", "dog": "animal"}')
    return [folder, tmp_path / "out", "--label-map", tmp_path / "map.json"]


def mistake_column_twice(folder: Path, tmp_path: Path) -> list[object]:
    (folder / "table.csv").write_text("path,labels,path\na.jpg,cat,a.jpg\n")
    return [folder / "table.csv", tmp_path / "out"]


def mistake_encoding(folder: Path, tmp_path: Path) -> list[object]:
    (folder / "table.csv").write_bytes(b"\xff\xfepath,labels\na.jpg,cat\n")
    return [folder / "table.csv", tmp_path / "out"]


def mistake_labels(folder: Path, tmp_path: Path) -> list[object]:
    (tmp_path / "labels.json").write_text('[{"id": 0, "name": "cat", "weight": 1}]')
    return [folder, tmp_path / "out", "--labels", tmp_path / "labels.json"]


def mistake_no_labels(folder: Path, tmp_path: Path) -> list[object]:
    (tmp_path / "labels.json").write_text("[]")
    return [folder, tmp_path / "out", "--labels", tmp_path / "labels.json"]


def mistake_tar_in_output(folder: Path, tmp_path: Path) -> list[object]:
    (tmp_path / "out").mkdir()
    with tarfile.open(tmp_path / "out" / "photos.TAR", "w") as tar:
        tar.add(folder, "photos")
    return [tmp_path / "out" / "photos.TAR", tmp_path / "out"]


def mistake_used(folder: Path, tmp_path: Path) -> list[object]:
    assert pack(folder, tmp_path / "out") == 0
    return [folder, tmp_path / "out"]


def mistake_output(folder: Path, tmp_path: Path) -> list[object]:
    (tmp_path / "file").write_text("")
    return [folder, tmp_path / "file" / "out"]


@pytest.mark.parametrize(
    ("mistake", "text"),
    [
        (mistake_empty, "holds no images; expected: <class>/<image>.jpg"),
        (mistake_no_class, "loose.jpg lies in no class folder"),
        (mistake_compressed, "not compressed"),
        (mistake_columns, "columns are file, labels; needed: path and labels"),
        (mistake_path, "No such file or directory"),
        (mistake_map, "not in the label map: 'dog'"),
        (mistake_map_form, "not a label map"),
        (mistake_map_letters, "the labels of a class are not a list"),
        (mistake_tar_in_output, "images to be packed lie in"),
        (mistake_column_twice, "columns are path, labels, path; needed: path and labels, once"),
        (mistake_encoding, "table.csv: cannot be read"),
        (mistake_labels, "not in the labels given: 'dog'"),
        (mistake_no_labels, "not in the labels given: 'cat', 'dog'; it has 0 entries"),
        (mistake_used, "index.json exists; choose another directory"),
        (mistake_output, "Not a directory"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    folder: Path,
    tmp_path: Path,
    mistake: Callable[[Path, Path], list[object]],
    text: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = mistake(folder, tmp_path)
    capsys.readouterr()
    assert pack(*arguments) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert text in errors[0]


@pytest.mark.parametrize("prefix", ["", "a/b", "../train"])
def test_a_prefix_is_the_beginning_of_a_name(prefix: str) -> None:
    with pytest.raises(ValueError, match=r"--prefix is .*; allowed: a name without '/'"):
        PackConfig(source=Path("photos"), output="out", prefix=prefix)


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
