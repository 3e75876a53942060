"""What pack_shards says of a mistake: one line, and exit code 2."""

from __future__ import annotations

import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pack_shards import PackConfig

from tests.jobs.photos import folder, pack, save_image, write_csv

__all__ = ["folder"]


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
