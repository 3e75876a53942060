"""The curves are drawn from whatever records a run has written."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest

from xdist.charts import draw_curves, smoothed, standing_records

Record = dict[str, Any]


def train(samples: int, *, staleness: float | None = None) -> Record:
    return {
        "kind": "train", "time": 0.0, "step": samples // 32, "samples": samples, "epoch": 0.1,
        "loss": 5.0 - samples / 1000, "learning_rate": 0.1, "samples_per_s": 500.0,
        "data_wait_s": 0.0, "num_workers": 2, "staleness_mean": staleness,
        "staleness_max": None if staleness is None else 2,
    }  # fmt: skip


def evaluation(samples: int, scores: dict[str, float], *, weights: str = "average") -> Record:
    return {
        "kind": "evaluation", "time": 0.0, "step": 1, "samples": samples, "weights": weights,
        "scores": scores,
    }  # fmt: skip


def recovery(samples: int) -> Record:
    return {
        "kind": "recovery", "time": 0.0, "step": 1, "samples": samples, "cause": "lost",
        "seconds": 1.0,
    }  # fmt: skip


START = {"kind": "start", "time": 0.0, "step": 0, "samples": 0}
SYNCHRONOUS = [
    START,
    *(train(samples) for samples in range(32, 960, 32)),
    evaluation(480, {"top1": 0.3, "top5": 0.7}),
    evaluation(960, {"top1": 0.4, "top5": 0.8}),
    evaluation(960, {"top1": 0.35, "top5": 0.75}, weights="raw"),
]
ASYNCHRONOUS = [
    START,
    *(train(samples, staleness=1.25) for samples in range(32, 960, 32)),
    recovery(320),
    recovery(640),
    evaluation(960, {"map100": 0.5, "map100_prevalence": 0.1}),
]


def picture_of(records: list[Record]) -> Any:
    file = io.BytesIO()
    draw_curves(records, file)
    file.seek(0)
    return matplotlib.image.imread(file, format="png")


@pytest.mark.parametrize(
    "records",
    [
        [],
        [START],
        [train(32)],
        SYNCHRONOUS,
        ASYNCHRONOUS,
        [evaluation(0, {"map100": float("nan")})],
    ],
    ids=["none", "start", "one", "synchronous", "asynchronous", "nan_score"],
)
def test_every_stage_of_a_run_gives_a_picture(records: list[Record], tmp_path: Path) -> None:
    draw_curves(records, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_staleness_and_scores_have_panels_only_where_there_are_any() -> None:
    heights = [picture_of(records).shape[0] for records in ([START], SYNCHRONOUS, ASYNCHRONOUS)]
    assert heights[0] < heights[1] < heights[2]


def test_a_recovery_is_visible() -> None:
    without = [record for record in ASYNCHRONOUS if record["kind"] != "recovery"]
    assert (picture_of(ASYNCHRONOUS) != picture_of(without)).any()


@pytest.mark.parametrize("back", [recovery(48), {**START, "samples": 48}])
def test_a_run_that_went_back_shows_only_what_stands(back: Record) -> None:
    first = [train(samples) for samples in (32, 64, 96)]
    again = [train(samples) for samples in (64, 96, 128)]
    assert standing_records([*first, back, *again]) == [first[0], back, *again]


def test_reports_of_the_same_place_stand_beside_each_other() -> None:
    both = [train(64), train(64)]
    assert standing_records(both) == both


def test_smoothing_is_centred_and_keeps_a_line() -> None:
    line = [float(i) for i in range(10)]
    assert smoothed(line, 3) == line
    assert smoothed([0.0, 3.0, 0.0], 1) == [0.0, 1.0, 0.0]
