"""Trackers: where the records of a run go besides metrics.jsonl: TensorBoard, and whom the user
has: Weights & Biases, MLflow.

They are told beside the driver's loop, and none of them ends a run: one that fails is told of no
more. Their steps are samples, as those of all curves.
"""

from __future__ import annotations

import importlib.util
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from xdist.beside import Beside
from xdist.config import TrackerName
from xdist.errors import UserError

logger = logging.getLogger(__name__)

TENSORBOARD = "tensorboard"
"""The directory of its event files, in the run directory; and the tracker's name."""
TRAIN_FIELDS = (
    "loss", "learning_rate", "samples_per_s", "epoch", "num_workers", "staleness_mean",
    "staleness_max", "worker_mib", "gpu_mib",
)  # fmt: skip
"""Of a `train` record, those that become curves."""
CLOSING_S = 10.0
"""For what is on its way, when the run ends."""


class Tracker(Protocol):
    """One of them."""

    def log(self, values: Mapping[str, float], *, samples: int) -> None:
        """Points of curves, by the curves' names."""

    def go_back(self, samples: int) -> None:
        """The run goes on from here: what came later is void."""

    def close(self) -> None:
        """Nothing follows."""


class TensorBoard:
    """Event files, which hide what is void."""

    def __init__(self, directory: Path) -> None:
        self._directory = str(directory / TENSORBOARD)
        self._writer: Any = None

    def go_back(self, samples: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # Takes a second.

        self.close()
        writer: Any = SummaryWriter
        self._writer = writer(self._directory, purge_step=samples + 1)

    def log(self, values: Mapping[str, float], *, samples: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, samples)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


class WandB:
    """A run of Weights & Biases, which a resumed run goes on with."""

    def __init__(self, directory: Path, *, name: str, run_id: str, config: dict[str, Any]) -> None:
        wandb: Any = importlib.import_module("wandb")
        self._run = wandb.init(
            dir=str(directory), name=name, id=run_id, resume="allow", config=config
        )
        self._run.define_metric("*", step_metric="samples")

    def go_back(self, samples: int) -> None:
        """It keeps what is void."""

    def log(self, values: Mapping[str, float], *, samples: int) -> None:
        self._run.log({**values, "samples": samples})

    def close(self) -> None:
        self._run.finish()


class MLflow:
    """A run of MLflow, at its tracking server (MLFLOW_TRACKING_URI)."""

    def __init__(self, *, name: str, run_id: str, config: dict[str, Any]) -> None:
        mlflow: Any = importlib.import_module("mlflow")
        self._client = mlflow.MlflowClient()
        experiment = mlflow.set_experiment(name.rpartition("-")[0] or name).experiment_id
        found = self._client.search_runs([experiment], f"tags.xdist_run = '{run_id}'")
        made = found[0] if found else self._client.create_run(
            experiment, run_name=name, tags={"xdist_run": run_id}
        )  # fmt: skip
        self._run_id = made.info.run_id
        if not found:
            self._client.log_dict(self._run_id, config, "config.json")

    def go_back(self, samples: int) -> None:
        """It keeps what is void."""

    def log(self, values: Mapping[str, float], *, samples: int) -> None:
        for name, value in values.items():
            self._client.log_metric(self._run_id, name, value, step=samples)

    def close(self) -> None:
        self._client.set_terminated(self._run_id)


def make_trackers(
    names: Sequence[TrackerName],
    directory: Path,
    *,
    name: str,
    run_id: str,
    config: dict[str, Any],
) -> dict[str, Callable[[], Tracker]]:
    """How each is made. directory: of the run, on this machine. Raises `UserError` where one is not
    installed.
    """
    for each in names:
        if importlib.util.find_spec(each) is None:
            raise UserError(
                f"trackers names {each}, which is not installed; pip install '.[{each}]', or leave "
                "it out"
            )
    ways: dict[str, Callable[[], Tracker]] = {
        TENSORBOARD: partial(TensorBoard, directory),
        "wandb": partial(WandB, directory, name=name, run_id=run_id, config=config),
        "mlflow": partial(MLflow, name=name, run_id=run_id, config=config),
    }
    return {each: ways[each] for each in names}


class Trackers:
    """All of a run, told by one thread."""

    def __init__(self, ways: Mapping[str, Callable[[], Tracker]]) -> None:
        self._ways = dict(ways)
        self._trackers: dict[str, Tracker] = {}
        self._start = 0
        self._beside = Beside("trackers")

    def go_back(self, samples: int) -> None:
        """The run goes on from here, for the first time or again."""
        self._start = samples
        self._tell(lambda tracker: tracker.go_back(samples), makes=False)

    def record(self, record: Mapping[str, Any]) -> None:
        """A record of metrics.jsonl."""
        if values := scalars(record):
            samples = record["samples"]
            self._tell(lambda tracker: tracker.log(values, samples=samples))

    def _tell(self, what: Callable[[Tracker], None], *, makes: bool = True) -> None:
        start = self._start

        def tell() -> None:
            for name in list(self._ways):
                try:
                    if name not in self._trackers and makes:
                        self._trackers[name] = self._ways[name]()
                        self._trackers[name].go_back(start)
                    if name in self._trackers:
                        what(self._trackers[name])
                except Exception as error:  # noqa: BLE001 - not ours, and no run ends for it
                    logger.warning("%s is told nothing any more: %s", name, error)
                    del self._ways[name]

        if self._ways:
            self._beside.submit(tell)

    def close(self) -> None:
        """Return when all is told, or after a while."""
        self._tell(lambda tracker: tracker.close(), makes=False)
        if not self._beside.close(CLOSING_S):
            logger.warning("not all trackers have got everything within %g s", CLOSING_S)


def scalars(record: Mapping[str, Any]) -> dict[str, float]:
    """What of a record becomes points of curves."""
    match record["kind"]:
        case "train":
            values = {f"train/{name}": record.get(name) for name in TRAIN_FIELDS}
            if record.get("step_s"):
                values["train/data_wait_share"] = record["data_wait_s"] / record["step_s"]
        case "evaluation":
            weights, scores = record["weights"], record["scores"]
            values = {f"score_{weights}/{name}": score for name, score in scores.items()}
        case "checkpoint":
            values = {"checkpoint/seconds": record["seconds"]}
        case _:
            values = {}
    return {
        name: float(value)
        for name, value in values.items()
        if value is not None and math.isfinite(value)
    }
