"""Which checkpoints of a run stay."""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection
from pathlib import Path

import pytest

from tests.xdist.test_checkpoint import STATISTICS, save
from xdist import checkpoint
from xdist.config import CheckpointConfig
from xdist.errors import UserError
from xdist.retention import Retention, read_scores

NOTHING_ELSE = CheckpointConfig(keep=1, keep_best=0)


def prune(
    run_dir: Path, *, newest: int, spare: Collection[str] = (), config: CheckpointConfig
) -> list[int]:
    """The steps of those that are left."""
    retention_of(run_dir, config).prune(newest=newest, spare=spare)
    return steps(run_dir)


def retention_of(run_dir: Path, config: CheckpointConfig) -> Retention:
    return Retention(str(run_dir), config, save_every_samples=10)


def steps(run_dir: Path) -> list[int]:
    return [int(url[-12:]) for url in checkpoint.directories(str(run_dir))]


def test_the_newest_and_the_spared_stay(tmp_path: Path) -> None:
    saved = [save(tmp_path, step=step) for step in range(1, 6)]
    config = CheckpointConfig(keep=2, keep_best=0)
    assert prune(tmp_path, newest=5, spare={saved[0].url}, config=config) == [1, 4, 5]


def test_where_none_is_to_be_seen_none_is_deleted(tmp_path: Path) -> None:
    """As where a file system is away for a while."""
    retention = Retention(str(tmp_path / "away"), NOTHING_ELSE, save_every_samples=10)
    retention.prune(newest=3)


def test_an_unpublished_newest_one_is_left_alone(tmp_path: Path) -> None:
    save(tmp_path, step=1)
    url = checkpoint.checkpoint_url(str(tmp_path), 2)
    checkpoint.write_statistics(url, STATISTICS)
    assert prune(tmp_path, newest=1, config=NOTHING_ELSE) == [1, 2]


@pytest.mark.parametrize("keep", [2, 5])
def test_an_unpublished_one_goes_when_two_later_ones_are_there(tmp_path: Path, keep: int) -> None:
    for step in (3, 5, 6):
        save(tmp_path, step=step)
    for step in (2, 4):
        checkpoint.write_statistics(checkpoint.checkpoint_url(str(tmp_path), step), STATISTICS)
    config = CheckpointConfig(keep=keep, keep_best=0)
    assert prune(tmp_path, newest=3, config=config) == [2, 3, 4, 5, 6]
    unfinished = {checkpoint.checkpoint_url(str(tmp_path), 4)}
    left = prune(tmp_path, newest=6, spare=unfinished, config=config)
    assert left == sorted([4, *[3, 5, 6][-keep:]])
    assert prune(tmp_path, newest=6, config=config) == [3, 5, 6][-keep:]


def test_damaged_newer_ones_do_not_cost_the_good_ones(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        save(tmp_path, step=step)
    for step in (3, 4):
        directory = Path(checkpoint.checkpoint_url(str(tmp_path), step))
        [path] = directory.glob(f"{checkpoint.STATISTICS_PART}-*")
        path.unlink()
    prune(tmp_path, newest=2, config=NOTHING_ELSE)
    found = checkpoint.latest(str(tmp_path))
    assert found is not None
    assert found.manifest.cut.step == 2


def test_the_best_stay_and_are_found(tmp_path: Path) -> None:
    saved = [save(tmp_path, step=step) for step in range(1, 7)]
    config = CheckpointConfig(keep=1, keep_best=2)
    retention = retention_of(tmp_path, config)
    for each, score in zip(saved, (0.1, 0.5, 0.3, 0.4, 0.2), strict=False):
        retention.scored(each.url, "average", {"map": score, "map_prevalence": 1.0})
        retention.scored(each.url, "raw", {"map": 1 - score})
    retention.prune(newest=6)
    assert steps(tmp_path) == [2, 4, 6]
    assert prune(tmp_path, newest=6, config=config) == [2, 4, 6]  # What they scored is stored.
    best, run_dir = checkpoint.find(f"{tmp_path}/best")
    assert (best.url, run_dir) == (saved[1].url, str(tmp_path))
    told = json.loads((tmp_path / "best.json").read_text())
    assert (told["measure"], told["score"]) == ("map", 0.5)
    assert read_scores(best.url) == {
        "average": {"map": 0.5, "map_prevalence": 1.0},
        "raw": {"map": 0.5},
    }


def test_the_best_one_is_named_also_where_none_is_kept_for_that(tmp_path: Path) -> None:
    saved = save(tmp_path, step=1)
    retention_of(tmp_path, NOTHING_ELSE).scored(saved.url, "raw", {"top1": 0.5})
    assert checkpoint.find(f"{tmp_path}/best")[0] == saved


def test_a_run_that_was_not_scored_has_no_best_one(tmp_path: Path) -> None:
    save(tmp_path, step=1)
    with pytest.raises(UserError, match="none of its checkpoints has been scored"):
        checkpoint.find(f"{tmp_path}/best")


def test_every_nth_stays_for_good(tmp_path: Path) -> None:
    config = CheckpointConfig(keep=1, keep_best=0, keep_every=4)
    for step in range(1, 11):
        save(tmp_path, step=step)
        prune(tmp_path, newest=step, config=config)
    assert steps(tmp_path) == [4, 8, 10]


def test_one_whose_pin_was_refused_is_pinned_the_next_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = CheckpointConfig(keep=1, keep_best=0, keep_every=2)
    retention = retention_of(tmp_path, config)
    save(tmp_path, step=1)
    retention.prune(newest=1)
    save(tmp_path, step=2)
    with monkeypatch.context() as refusing:
        refusing.setattr("xdist.retention.write_bytes", refuse)
        with pytest.raises(PermissionError):
            retention.prune(newest=2)
    save(tmp_path, step=3)
    retention.prune(newest=3)
    assert steps(tmp_path) == [2, 3]


def refuse(*_arguments: object) -> None:
    raise PermissionError


def test_one_that_cannot_be_deleted_keeps_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    saved = [save(tmp_path, step=step) for step in (1, 2, 3)]

    def delete(url: str) -> None:
        if url == saved[0].url:
            raise PermissionError(f"{url} is somebody else's")
        shutil.rmtree(url)

    monkeypatch.setattr("xdist.retention.remove_directory", delete)
    assert prune(tmp_path, newest=3, config=NOTHING_ELSE) == [1, 3]
    assert f"checkpoint not deleted: {saved[0].url}" in caplog.text
    found = checkpoint.latest(str(tmp_path))
    assert found is not None
    assert found.manifest.cut.step == 3


def test_what_is_kept_for_good_stays_so_where_the_settings_change(tmp_path: Path) -> None:
    for step in range(1, 6):
        save(tmp_path, step=step)
        prune(tmp_path, newest=step, config=CheckpointConfig(keep=1, keep_best=0, keep_every=2))
    assert steps(tmp_path) == [2, 4, 5]
    later = Retention(str(tmp_path), NOTHING_ELSE, save_every_samples=70)
    save(tmp_path, step=7)
    later.prune(newest=7)
    assert steps(tmp_path) == [2, 4, 7]


def test_where_one_is_left_out_the_next_is_kept_for_good(tmp_path: Path) -> None:
    config = CheckpointConfig(keep=1, keep_best=0, keep_every=4)
    for step in (1, 2, 3, 5, 6, 7, 9):
        save(tmp_path, step=step)
        prune(tmp_path, newest=step, config=config)
    assert steps(tmp_path) == [5, 9]


def test_scores_that_are_none_cost_nothing(tmp_path: Path) -> None:
    saved = [save(tmp_path, step=step) for step in (1, 2, 3)]
    Path(saved[0].url, "scores.json").write_text('{"average": 5}')
    Path(saved[1].url, "scores.json").write_text('{"average": {"top1": "much"}}')
    assert prune(tmp_path, newest=3, config=CheckpointConfig(keep=1)) == [3]


def test_scores_of_another_measure_are_not_compared(tmp_path: Path) -> None:
    first, second = (save(tmp_path, step=step) for step in (1, 2))
    retention = retention_of(tmp_path, CheckpointConfig())
    retention.scored(first.url, "raw", {"top5": 0.9})
    retention.scored(second.url, "raw", {"top1": 0.1})
    assert checkpoint.find(f"{tmp_path}/best")[0] == second


def test_a_pinned_one_is_never_deleted(tmp_path: Path) -> None:
    saved = [save(tmp_path, step=step) for step in range(1, 5)]
    Path(saved[1].url, "pinned").touch()
    assert prune(tmp_path, newest=4, config=NOTHING_ELSE) == [2, 4]
