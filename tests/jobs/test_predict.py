"""Predictions of a checkpoint: the network's own scores, in each form that they are told in."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import predict
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from datapipe.batch import normalize
from tests.datapipe.small_sets import encode, picture
from tests.small_runs import NUM_LABELS, small_config
from tests.xdist.test_scoring import saved
from xdist.prediction import crop
from xdist.scoring import load_model

NUM_IMAGES = 5


@dataclass(frozen=True)
class Trained:
    """A run, photographs, and what its network gives for them."""

    run_dir: str
    photos: Path
    scores: torch.Tensor
    """(N, C): in the order of their names."""


@pytest.fixture
def trained(tmp_path: Path) -> Trained:
    config = small_config(tmp_path, strategy="push_pull")
    found = saved(config, tmp_path, noise=0.3)
    photos = tmp_path / "photos"
    photos.mkdir()
    side = config.data.image_size
    pixels = np.empty((NUM_IMAGES, side, side, 3), np.uint8)
    for number in range(NUM_IMAGES):
        payload = encode(picture(number))
        (photos / f"{number}.jpg").write_bytes(payload)
        crop(payload, pixels[number], config.data)
    model = load_model(config, NUM_LABELS, found, "average")
    with torch.inference_mode():
        scores = model(normalize(torch.from_numpy(pixels))).sigmoid()
    return Trained(str(tmp_path / "run"), photos, scores)


def lines_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def exit_code(arguments: list[str]) -> object:
    try:
        return predict.main(arguments)
    except SystemExit as error:
        return error.code


def check(rows: list[dict[str, Any]], trained: Trained, *, top_k: int = 3) -> None:
    values, labels = trained.scores.topk(top_k)
    assert [Path(row["image"]).name for row in rows] == [f"{i}.jpg" for i in range(NUM_IMAGES)]
    assert [row["ids"] for row in rows] == labels.tolist()
    assert [row["labels"] for row in rows] == [
        [f"label {label}" for label in of_image] for of_image in labels.tolist()
    ]
    torch.testing.assert_close(torch.tensor([row["scores"] for row in rows]), values)
    assert all(row["error"] is None for row in rows)


@pytest.mark.parametrize("batch_size", ["1", "2", "100"])
def test_lines_and_tables_hold_the_scores_of_the_network(
    trained: Trained, tmp_path: Path, batch_size: str
) -> None:
    options = ["--top-k", "3", "--batch-size", batch_size]
    arguments = [trained.run_dir, str(trained.photos), *options]
    lines, table = tmp_path / "out.jsonl", tmp_path / "out.parquet"
    assert predict.main([*arguments, "--output", str(lines)]) == 0
    check(lines_of(lines), trained)
    assert predict.main([*arguments, "--output", str(table)]) == 0
    check(pq.read_table(table).to_pylist(), trained)


def test_a_table_names_the_labels(trained: Trained, capsys: pytest.CaptureFixture[str]) -> None:
    assert predict.main([trained.run_dir, str(trained.photos / "0.jpg")]) == 0
    shown = capsys.readouterr().out
    assert trained.scores.std(1).min() > 0.01
    best = int(trained.scores[0].argmax())
    assert f"{trained.scores[0, best]:.3f} label {best}" in shown


def test_an_image_that_cannot_be_used_costs_no_other(
    trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (trained.photos / "2.jpg").write_bytes(b"no image")
    output = tmp_path / "out.jsonl"
    arguments = [trained.run_dir, str(trained.photos), "--output", str(output)]
    assert predict.main(arguments) == 1
    rows = lines_of(output)
    assert [row["error"] is None for row in rows] == [True, True, False, True, True]
    assert rows[2]["labels"] == []
    assert "1 images could not be used" in capsys.readouterr().err


def test_a_contact_sheet_shows_all(trained: Trained, tmp_path: Path) -> None:
    sheet = tmp_path / "sheet.png"
    arguments = [trained.run_dir, str(trained.photos), "--sheet", str(sheet)]
    assert predict.main(arguments) == 0
    with Image.open(sheet) as image:
        assert image.width > 400


def test_labels_that_are_not_known_have_numbers(
    trained: Trained, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "train" / "labels.json").unlink()
    output = tmp_path / "out.jsonl"
    assert predict.main([trained.run_dir, str(trained.photos), "--output", str(output)]) == 0
    assert lines_of(output)[0]["labels"] == [str(label) for label in lines_of(output)[0]["ids"]]
    assert "labels have numbers instead of names" in caplog.text


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["no-run", "photo.jpg"], "neither a checkpoint nor a run directory"),
        (["RUN", "no-photo.jpg"], "there is no such file or folder"),
        (["RUN", "PHOTOS", "--top-k", "0"], "--top-k is 0; allowed: at least 1"),
        (["RUN", "PHOTOS", "--output", "x.csv"], "allowed endings: .jsonl, .parquet"),
        (["RUN", "PHOTOS", "--sheet", "x.jpg"], "allowed ending: .png"),
        (["RUN", "PHOTOS", "--labels", "no.json"], "there is no such file"),
        (["RUN/best", "PHOTOS"], "none of its checkpoints has been scored"),
    ],
)
def test_what_the_user_can_mend_is_said_in_one_line(
    trained: Trained, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    places = {"RUN": trained.run_dir, "PHOTOS": str(trained.photos)}
    places["RUN/best"] = f"{trained.run_dir}/best"
    assert exit_code([places.get(word, word) for word in arguments]) == 2
    text = capsys.readouterr().err
    assert said in text
    assert "Traceback" not in text
