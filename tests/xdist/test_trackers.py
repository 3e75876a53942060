"""Who is told of a run besides its own directory."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from xdist import trackers as trackers_module
from xdist.errors import UserError
from xdist.trackers import Ended, Trackers, make_trackers, scalars

TRAIN = {
    "kind": "train", "samples": 40, "loss": 2.5, "learning_rate": 0.1, "samples_per_s": 8.0,
    "epoch": 0.5, "num_workers": 2, "staleness_mean": None, "staleness_max": None,
    "worker_mib": 400.0, "gpu_mib": 0.0, "step_s": 4.0, "data_wait_s": 1.0,
}  # fmt: skip
EVALUATION = {"kind": "evaluation", "samples": 40, "weights": "average", "scores": {"top1": 0.25}}


def tensorboard(directory: Path) -> Trackers:
    return Trackers(make_trackers(("tensorboard",), directory, name="run", run_id="1", config={}))


def curves(directory: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows."""
    events: Any = EventAccumulator
    found = events(str(directory / "tensorboard"))
    found.Reload()
    return {
        name: [(event.step, event.value) for event in found.Scalars(name)]
        for name in found.Tags()["scalars"]
    }


def train_at(samples: int, loss: float) -> dict[str, Any]:
    return {**TRAIN, "samples": samples, "loss": loss}


def test_curves_are_those_of_the_records(tmp_path: Path) -> None:
    trackers = tensorboard(tmp_path)
    trackers.go_back(0)
    for record in (train_at(20, 3.0), TRAIN, EVALUATION, {"kind": "group", "samples": 40}):
        trackers.record(record)
    trackers.close()
    found = curves(tmp_path)
    assert found["train/loss"] == [(20, 3.0), (40, 2.5)]
    assert found["train/data_wait_share"] == [(20, 0.25), (40, 0.25)]
    assert found["score_average/top1"] == [(40, 0.25)]
    assert "train/staleness_mean" not in found


@pytest.mark.parametrize("is_another_process", [False, True])
def test_what_a_run_does_again_replaces_what_it_had_done(
    tmp_path: Path, is_another_process: bool
) -> None:
    trackers = tensorboard(tmp_path)
    trackers.go_back(0)
    for samples in (10, 20, 30):
        trackers.record(train_at(samples, 1.0))
    if is_another_process:
        trackers.close()
        trackers = tensorboard(tmp_path)
    trackers.go_back(20)
    trackers.record(train_at(30, 2.0))
    trackers.close()
    assert curves(tmp_path)["train/loss"] == [(10, 1.0), (20, 1.0), (30, 2.0)]


class Broken:
    """Fails with what it is told, until it does not."""

    def __init__(self) -> None:
        self.num_calls = 0
        self.told: list[int] = []
        self.is_whole = False

    def go_back(self, samples: int) -> None:
        pass

    def log(self, values: Mapping[str, float], *, samples: int) -> None:
        self.num_calls += 1
        if not self.is_whole:
            raise OSError(f"no connection at {samples}: {len(values)} values")
        self.told.append(samples)

    def close(self, ended: Ended) -> None:
        pass


def test_one_that_fails_costs_no_other_and_is_asked_again_when_the_run_ends(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    broken = Broken()
    ways = make_trackers(("tensorboard",), tmp_path, name="run", run_id="1", config={})
    trackers = Trackers({"broken": lambda: broken, **ways})
    trackers.go_back(0)
    for samples in (10, 20):
        trackers.record(train_at(samples, 1.0))
    trackers.close()
    assert broken.num_calls == 2
    assert caplog.text.count("broken fails, and is told later, if it does not: no conn") == 1
    assert "broken lacks the last 2 records" in caplog.text
    assert len(curves(tmp_path)["train/loss"]) == 2


class FailsToClose(Broken):
    """A way to track that hears of all but the end."""

    def __init__(self) -> None:
        super().__init__()
        self.is_whole = True

    def close(self, ended: Ended) -> None:
        raise OSError(f"no answer to {ended}")


def test_one_that_does_not_hear_of_the_end_lacks_no_record(
    caplog: pytest.LogCaptureFixture,
) -> None:
    trackers = Trackers({"late": FailsToClose})
    trackers.record(train_at(10, 1.0))
    trackers.close()
    assert "late was not told that the run has ended" in caplog.text
    assert "lacks" not in caplog.text


def test_one_that_failed_is_told_what_it_has_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers_module, "RETRY_S", 0.0)
    broken = Broken()
    trackers = Trackers({"broken": lambda: broken})
    for samples in (10, 20):
        trackers.record(train_at(samples, 1.0))
    trackers._beside.submit(lambda: setattr(broken, "is_whole", True)).result()
    trackers.record(train_at(30, 1.0))
    trackers.close()
    assert broken.told == [10, 20, 30]


def test_curves_go_on_when_their_disk_is_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trackers_module, "RETRY_S", 0.0)
    directory = tmp_path / "run"
    directory.mkdir()
    trackers = tensorboard(directory)
    trackers.go_back(0)
    trackers.record(train_at(10, 3.0))
    trackers._beside.submit(int).result()
    directory.rename(tmp_path / "away")
    directory.touch()
    trackers.go_back(10)  # Opens a file.
    trackers.record(train_at(20, 2.0))
    trackers._beside.submit(int).result()
    directory.unlink()
    (tmp_path / "away").rename(directory)
    trackers.record(train_at(30, 1.0))
    trackers.close()
    assert curves(directory)["train/loss"] == [(10, 3.0), (20, 2.0), (30, 1.0)]


@pytest.mark.skipif(find_spec("wandb") is not None, reason="wandb is installed")
def test_one_that_is_not_installed_is_named_with_what_installs_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"names wandb, which is not .*pip install '.\[wandb\]'"):
        make_trackers(("wandb",), tmp_path, name="run", run_id="1", config={})


def test_a_loss_that_is_no_number_is_no_point() -> None:
    assert "train/loss" not in scalars({**TRAIN, "loss": None})
    assert "train/loss" not in scalars({**TRAIN, "loss": float("nan")})


def test_a_run_of_mlflow_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow: Any = pytest.importorskip("mlflow", reason="pip install '.[mlflow]'")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file://{tmp_path}/mlruns")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    client = mlflow.MlflowClient()
    for samples, error, status in ((10, KeyboardInterrupt(), "KILLED"), (20, None, "FINISHED")):
        tell_once(make_trackers(("mlflow",), tmp_path, **RUN), samples, error)
        [experiment] = client.search_experiments(filter_string="name = 'imagenet_sync'")
        [found] = client.search_runs([experiment.experiment_id])
        assert found.info.status == status
    history = client.get_metric_history(found.info.run_id, "train/loss")
    assert [(metric.step, metric.value) for metric in history] == [(10, 1.0), (20, 1.0)]


def test_a_run_of_wandb_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("wandb", reason="pip install '.[wandb]'")
    monkeypatch.setenv("WANDB_MODE", "offline")
    for samples in (10, 20):
        tell_once(make_trackers(("wandb",), tmp_path, **RUN), samples)
    assert "wandb fails" not in caplog.text
    assert list((tmp_path / "wandb").glob("offline-run-*-1/run-1.wandb"))


RUN: dict[str, Any] = {"name": "imagenet_sync-1234", "run_id": "1", "config": {"a": {"b": 1}}}


def tell_once(ways: Mapping[str, Any], samples: int, error: BaseException | None = None) -> None:
    trackers = Trackers(ways)
    trackers.go_back(samples - 10)
    trackers.record(train_at(samples, 1.0))
    trackers.close(error)
