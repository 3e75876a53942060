"""Synthetic scenes: what they hold, and that making them is repeatable and atomic."""

from __future__ import annotations

import json
import multiprocessing
import tarfile
from collections import Counter
from pathlib import Path

import make_scenes
import numpy as np
import pytest

from datapipe.index import ShardIndex
from datapipe.labels import read_labels
from datapipe.scenes import (
    FAMILY_OF_COLOR,
    FAMILY_OF_SHAPE,
    MAX_LABELS,
    MIN_LABELS,
    PATTERNED,
    SPLITS,
    label_names,
    scene,
)
from datapipe.scenes.drawing import draw
from datapipe.scenes.making import SceneDirectories, ScenesConfig, ensure_scenes, raw_images

SMALL = ScenesConfig(num_train=12, num_evaluation=5, image_size=16, seed=3)


def files_of(directory: Path) -> dict[str, bytes]:
    paths = sorted(path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): path.read_bytes() for path in paths}


def make(directory: Path) -> SceneDirectories:
    return ensure_scenes(directory, SMALL)


def test_every_scene_has_five_to_fifteen_of_some_hundreds_of_labels() -> None:
    names = label_names()
    assert len(set(names)) == len(names)
    assert 250 <= len(names) <= 450
    for number in range(1000):
        labels = scene(0, "train", number).labels()
        assert 5 <= MIN_LABELS <= len(labels) <= MAX_LABELS <= 15
        assert labels <= set(names)


def test_most_scenes_hold_several_objects() -> None:
    numbers = Counter(len(scene(0, "train", number).objects) for number in range(1000))
    assert set(numbers) == {1, 2, 3}
    assert numbers[2] + numbers[3] > 800


def test_a_label_brings_its_parents() -> None:
    for number in range(200):
        current = scene(1, "evaluation", number)
        labels = current.labels()
        for item in current.objects:
            assert {item.shape, FAMILY_OF_SHAPE[item.shape]} <= labels
            assert {item.color, FAMILY_OF_COLOR[item.color]} <= labels
            assert f"{item.color} {item.shape}" in labels
            assert (item.texture in labels) == (item.texture != "plain")
            assert item.texture == "plain" or PATTERNED in labels


def test_label_frequencies_have_a_long_tail() -> None:
    counts = Counter(name for i in range(1500) for name in scene(0, "train", i).labels())
    shares = np.sort([counts[name] / 1500 for name in label_names()])[::-1]
    assert shares[0] > 0.5
    assert np.median(shares) < 0.02
    assert counts["circle"] > 5 * counts["half disc"]


def test_scenes_depend_on_seed_split_and_number_alone() -> None:
    one, other, *_ = raw_images(0, "train", num_scenes=2, image_size=32)
    (same,) = raw_images(0, "train", num_scenes=1, image_size=32)
    (held_out,) = raw_images(0, "evaluation", num_scenes=1, image_size=32)
    (reseeded,) = raw_images(1, "train", num_scenes=1, image_size=32)
    assert one == same
    assert len({one.payload, other.payload, held_out.payload, reseeded.payload}) == 4


def test_an_object_is_drawn_in_its_color() -> None:
    for number in range(50):
        current = scene(0, "train", number)
        pixels = np.asarray(draw(current, image_size=64), np.int64)
        assert pixels.shape == (64, 64, 3)
        empty = np.asarray(
            draw(type(current)(current.background, (), current.noise_seed), image_size=64)
        )
        assert 0.01 < (np.abs(pixels - empty).sum(axis=2) > 0).mean() < 0.9


def test_a_made_data_set_opens_and_its_weights_are_training_frequencies(tmp_path: Path) -> None:
    made = make(tmp_path)
    counts = Counter(name for i in range(SMALL.num_train) for name in scene(3, "train", i).labels())
    labels = read_labels(str(made.train / "labels.json"))
    assert [label.name for label in labels] == list(label_names())
    assert [label.weight for label in labels] == [counts[label.name] / 12 for label in labels]
    assert read_labels(str(made.evaluation / "labels.json")) == labels
    for directory, num_scenes in ((made.train, 12), (made.evaluation, 5)):
        index = ShardIndex.open(str(directory))
        index.check_shards()
        assert index.num_samples == num_scenes


def test_stored_label_ids_name_the_labels_of_the_scene(tmp_path: Path) -> None:
    made = make(tmp_path)
    with tarfile.open(made.train / "train-00000.tar") as tar:
        members = [tar.extractfile(f"{number:06d}.json") for number in range(12)]
        stored = [json.load(member)["labels"] for member in members if member is not None]
    names = label_names()
    assert [{names[i] for i in ids} for ids in stored] == [
        scene(3, "train", number).labels() for number in range(12)
    ]


def test_the_same_arguments_give_the_same_bytes(tmp_path: Path) -> None:
    make(tmp_path / "one")
    make(tmp_path / "other")
    assert files_of(tmp_path / "one") == files_of(tmp_path / "other")


def test_scenes_that_are_there_are_not_made_again(tmp_path: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in make(tmp_path).train.iterdir()}
    assert {path: path.stat().st_mtime_ns for path in make(tmp_path).train.iterdir()} == before


def test_other_arguments_go_to_another_directory() -> None:
    configs = [
        SMALL,
        ScenesConfig(num_train=13, num_evaluation=5, image_size=16, seed=3),
        ScenesConfig(num_train=12, num_evaluation=6, image_size=16, seed=3),
        ScenesConfig(num_train=12, num_evaluation=5, image_size=17, seed=3),
        ScenesConfig(num_train=12, num_evaluation=5, image_size=16, seed=4),
    ]
    assert len({config.directory_name() for config in configs}) == len(configs)


@pytest.mark.slow
def test_concurrent_makers_leave_one_complete_data_set(tmp_path: Path) -> None:
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        results = pool.map(make, [tmp_path] * 3)
    assert len(set(results)) == 1
    assert [path.name for path in tmp_path.iterdir()] == [SMALL.directory_name()]
    assert {path.name for path in (tmp_path / SMALL.directory_name()).iterdir()} == set(SPLITS)


def test_the_command_line_makes_scenes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--directory", str(tmp_path), "--num-train", "2", "--num-evaluation", "1"]
    assert make_scenes.main([*arguments, "--image-size", "16"]) == 0
    name = ScenesConfig(num_train=2, num_evaluation=1, image_size=16).directory_name()
    assert str(tmp_path / name / "train") in capsys.readouterr().out


def test_a_wrong_value_is_one_line_and_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert make_scenes.main(["--directory", str(tmp_path), "--num-train", "0"]) == 2
    assert capsys.readouterr().err == "error: --num-train is 0; allowed: at least 1\n"


def test_a_directory_that_cannot_be_made_is_one_line_and_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("in the way")
    assert make_scenes.main(["--directory", str(tmp_path / "file" / "data")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
