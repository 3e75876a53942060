"""Pages that tell of runs, as a real browser shows them."""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import report
from PIL import Image

from tests.small_runs import run, small_config
from xdist.report import distinct, page, read_run

CHROMIUM = shutil.which("chromium")
HOSTILE = '<script>console.error("hostile")</script>'


@pytest.fixture(scope="module")
def run_dirs(tmp_path_factory: pytest.TempPathFactory, cluster: object) -> list[Path]:
    """A run that was resumed, and one of the other strategy, of which a worker was lost."""
    assert cluster
    directory = tmp_path_factory.mktemp("report")
    config = small_config(directory, strategy="all_reduce", max_steps=3, is_scored=True)
    for max_steps in (3, 6):
        run(replace(config, max_steps=max_steps), directory / "first")
    run(replace(config, strategy="push_pull", max_steps=4), directory / "second")
    lost = {"kind": "recovery", "time": 1.0, "step": 4, "samples": 16, "host": None}
    with (directory / "second" / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({**lost, "cause": "storage failed", "reason": ""}) + "\n")
        file.write(json.dumps({**lost, "cause": f"worker 1 {HOSTILE} lost", "reason": HOSTILE}))
        file.write('\n{"kind": "tra')
    for name in ("first", "second"):
        config_file = directory / name / "config.json"
        config_file.write_text(json.dumps({**json.loads(config_file.read_text()), "run_dir": name}))
    return [directory / "first", directory / "second"]


pytestmark = [pytest.mark.ray, pytest.mark.timeout(120)]


def test_a_page_tells_what_the_runs_came_to_and_how_they_differ(
    run_dirs: list[Path], tmp_path: Path
) -> None:
    output = tmp_path / "report.html"
    assert report.main([*map(str, run_dirs), "-o", str(output)]) == 0
    text = output.read_text()
    assert "<h1>2 runs</h1>" in text
    assert "<td>strategy</td><td>all_reduce</td><td>push_pull</td>" in text
    assert "<td>updates</td><td>6</td><td>4</td>" in text
    assert "<td>resumes</td><td>1</td><td>0</td>" in text
    assert "<td>recoveries</td><td>0</td><td>2</td>" in text
    assert "<td>max_steps</td><td>6</td><td>4</td>" in text
    assert "top1" in text
    assert text.count("data:image/svg+xml;base64,") == 5
    assert "<script" not in text
    assert "http" not in text.replace("http-equiv", "")


@pytest.mark.skipif(CHROMIUM is None, reason="apt-get install -y chromium")
def test_a_browser_shows_it_and_has_nothing_to_say(run_dirs: list[Path], tmp_path: Path) -> None:
    output, picture = tmp_path / "report.html", tmp_path / "report.png"
    assert report.main([*map(str, run_dirs), "-o", str(output)]) == 0
    shown = subprocess.run(
        [
            str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
            "--enable-logging=stderr", "--window-size=1100,2600", f"--screenshot={picture}",
            f"--user-data-dir={tmp_path / 'profile'}", output.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )  # fmt: skip
    assert "CONSOLE" not in shown.stderr
    pixels = np.asarray(Image.open(picture).convert("RGB")).reshape(-1, 3)
    for color in ((0x00, 0x72, 0xB2), (0xE6, 0x9F, 0x00)):  # Of the two runs' curves.
        assert (np.abs(pixels.astype(int) - color).max(1) < 8).sum() > 200


def test_charts_are_written_as_pictures_too(run_dirs: list[Path], tmp_path: Path) -> None:
    options = ["-o", str(tmp_path / "report.html"), "--pictures", str(tmp_path / "pictures")]
    assert report.main([str(run_dirs[1]), *options]) == 0
    names = {path.name for path in (tmp_path / "pictures").iterdir()}
    assert names == {"loss.png", "score.png", "throughput.png", "data-wait.png", "staleness.png"}
    for path in (tmp_path / "pictures").iterdir():
        with Image.open(path) as image:
            assert image.width > 800


def test_two_runs_of_one_name_are_told_apart(run_dirs: list[Path], tmp_path: Path) -> None:
    other = tmp_path / "first"
    shutil.copytree(run_dirs[0], other)
    runs = distinct([read_run(str(path)) for path in (run_dirs[0], other)])
    assert list(runs) == [str(run_dirs[0]), str(other)]
    assert page(runs)


def broken(directory: Path, config: str | None, metrics: str | None) -> str:
    directory.mkdir()
    for name, text in (("config.json", config), ("metrics.jsonl", metrics)):
        if text is not None:
            (directory / name).write_text(text)
    return str(directory)


@pytest.mark.parametrize(
    ("config", "metrics", "said"),
    [
        (None, None, "is no run directory: it has no config.json and metrics.jsonl"),
        ("{}", None, "is no run directory"),
        ("{", "", "cannot be read"),
        ("{}", "", "the run has not begun"),
        ("[]", '{"kind": "start"}', "the run has not begun"),
        ("{}", "garbage\n[1]\n5\nnull\n", "the run has not begun"),
        ("{}", '{"kind": "train"}\n{"kind": "start", "samples": "x"}', "the run has not begun"),
    ],
)
def test_what_is_no_run_is_said_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], config: Any, metrics: Any, said: str
) -> None:
    assert report.main([broken(tmp_path / "run", config, metrics)]) == 2
    text = capsys.readouterr().err
    assert said in text
    assert "Traceback" not in text
