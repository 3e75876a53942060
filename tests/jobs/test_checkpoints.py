"""What is told of the checkpoints of a run, and what is done with them by hand."""

from __future__ import annotations

from pathlib import Path

import checkpoints
import pytest

from tests.xdist.test_checkpoint import STATISTICS, save
from tests.xdist.test_retention import prune, retention_of
from xdist import checkpoint
from xdist.config import CheckpointConfig

KEEPS_ONE = CheckpointConfig(keep=1, keep_best=0)


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """Four checkpoints, of which the second has the best score, and one that is being written."""
    saved = [save(tmp_path, step=step) for step in (1, 2, 3, 4)]
    retention = retention_of(tmp_path, KEEPS_ONE)
    for each, score in zip(saved, (0.1, 0.5, 0.25), strict=False):
        retention.scored(each.url, "average", {"top1": score})
    checkpoint.write_statistics(checkpoint.checkpoint_url(str(tmp_path), 5), STATISTICS)
    return tmp_path


def lines(capsys: pytest.CaptureFixture[str]) -> dict[int, str]:
    """Of the table, by step."""
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    return {int(row.split("│")[1]): row for row in rows}


def test_a_line_tells_of_each(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert checkpoints.main([str(run_dir), "--pin", "3"]) == 0
    found = lines(capsys)
    assert list(found) == [1, 2, 3, 4, 5]
    assert "top1 0.5000 (average)" in found[2]
    assert [step for step in found if "best" in found[step]] == [2]
    assert [step for step in found if "pinned" in found[step]] == [3]
    assert [step for step in found if "not published" in found[step]] == [5]
    assert " 40 " in found[4]  # Samples.


def test_what_is_pinned_stays_until_it_is_not(run_dir: Path) -> None:
    assert checkpoints.main([str(run_dir), "--pin", "1", "3"]) == 0
    assert prune(run_dir, newest=4, config=KEEPS_ONE) == [1, 3, 4, 5]
    assert checkpoints.main([str(run_dir), "--unpin", "1"]) == 0
    assert checkpoints.main([str(run_dir), "--unpin", "4"]) == 0  # It was not.
    assert prune(run_dir, newest=4, config=KEEPS_ONE) == [3, 4, 5]


def test_a_damaged_one_is_found_by_reading(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = Path(checkpoint.checkpoint_url(str(run_dir), 2))
    [path] = directory.glob(f"{checkpoint.STATISTICS_PART}-*")
    payload = bytearray(path.read_bytes())
    payload[-1] ^= 1
    path.write_bytes(payload)
    assert checkpoints.main([str(run_dir)]) == 0
    capsys.readouterr()
    assert checkpoints.main([str(run_dir), "--verify"]) == 1
    said = capsys.readouterr()
    assert said.err.startswith(f"damaged: {path}")
    assert said.out.count("damaged") == 1


def test_a_step_that_is_not_there_is_refused(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert checkpoints.main([str(run_dir), "--pin", "7"]) == 2
    assert "has no checkpoint of step 7; it has: 1, 2, 3, 4, 5" in capsys.readouterr().err


def test_one_is_not_both_kept_and_left(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        checkpoints.main([str(run_dir), "--pin", "3", "--unpin", "3"])
    assert "step 3 is both in --pin and in --unpin" in capsys.readouterr().err


def test_a_directory_without_checkpoints_is_no_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert checkpoints.main([str(tmp_path)]) == 2
    assert "has no checkpoints; give a run directory" in capsys.readouterr().err
