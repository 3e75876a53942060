"""Trackers: where the records of a run go besides metrics.jsonl: TensorBoard, and whom the user
has: Weights & Biases, MLflow.

They are told beside the driver's loop, and none of them ends a run: one that fails is made anew
after a while, and told then what it has missed. Their steps are samples, as those of all curves.
"""

from __future__ import annotations

import importlib.util
import io
import itertools
import logging
import math
import os
import platform
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

from xdist.beside import Beside
from xdist.config import TrackerName
from xdist.errors import RunTaken, UserError

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
RETRY_S = 60.0
"""From when one fails to when it is tried again."""
MOST_MISSED = 10_000
"""Records that are kept for one that fails."""


Ended = Literal["FINISHED", "FAILED", "KILLED"] | None
"""How a run ended, in MLflow's words; killed: by who may resume it. None: it goes on."""


def _ended_by(error: BaseException | None) -> Ended:
    if error is None:
        return "FINISHED"
    if isinstance(error, RunTaken):
        return None
    return "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED"


class Tracker(Protocol):
    """One of them."""

    def log(self, values: Mapping[str, float], *, samples: int) -> None:
        """Points of curves, by the curves' names."""

    def go_back(self, samples: int) -> None:
        """The run goes on from here: what came later is void."""

    def close(self, ended: Ended) -> None:
        """Nothing follows, until it is made anew."""


_file_numbers = itertools.count()


class TensorBoard:
    """Event files, which hide what is void. They are written at once, not by torch's SummaryWriter,
    whose thread ends where a disk is full for a moment.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory / TENSORBOARD
        self._file: Path | None = None

    def go_back(self, samples: int) -> None:
        from tensorboard.compat.proto.event_pb2 import SessionLog

        self._file = None
        self._append({"step": samples + 1, "session_log": SessionLog(status=SessionLog.START)})

    def log(self, values: Mapping[str, float], *, samples: int) -> None:
        from torch.utils.tensorboard.summary import scalar  # Takes a second.

        make: Any = scalar
        self._append(*({"step": samples, "summary": make(*each)} for each in values.items()))

    def _append(self, *events: dict[str, Any]) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.summary.writer.record_writer import RecordWriter

        content = io.BytesIO()
        writer: Any = RecordWriter(content)
        for fields in events if self._file else ({"file_version": "brain.Event:2"}, *events):
            writer.write(Event(wall_time=time.time(), **fields).SerializeToString())
        self._file = self._file or self._new_file()
        with self._file.open("ab") as file:
            file.write(content.getvalue())

    def _new_file(self) -> Path:
        """Its name is after those of before, in whose order they are read."""
        self._directory.mkdir(exist_ok=True)  # Not beneath a file system that was unmounted.
        made = f"{time.time():017.6f}.{platform.node()}.{os.getpid()}.{next(_file_numbers)}"
        return self._directory / f"events.out.tfevents.{made}"

    def close(self, ended: Ended) -> None:
        """Nothing is open."""


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

    def close(self, ended: Ended) -> None:
        self._run.finish(exit_code=int(ended in ("FAILED", "KILLED")))


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
        if found:
            self._client.update_run(self._run_id, status="RUNNING")
        else:
            self._client.log_dict(self._run_id, config, "config.json")

    def go_back(self, samples: int) -> None:
        """It keeps what is void."""

    def log(self, values: Mapping[str, float], *, samples: int) -> None:
        for name, value in values.items():
            self._client.log_metric(self._run_id, name, value, step=samples)

    def close(self, ended: Ended) -> None:
        if ended is not None:
            self._client.set_terminated(self._run_id, status=ended)


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


class _Told:
    """One tracker, and what it is to be told yet."""

    def __init__(self, name: str, make: Callable[[], Tracker]) -> None:
        self._name = name
        self._make = make
        self._tracker: Tracker | None = None
        self._missed: deque[Callable[[Tracker], None]] = deque(maxlen=MOST_MISSED)
        self._not_before = -math.inf
        self._has_failed = False

    def tell(self, what: Callable[[Tracker], None]) -> None:
        self._missed.append(what)
        if time.monotonic() >= self._not_before:
            self._catch_up()

    def _catch_up(self) -> None:
        try:
            if self._tracker is None:
                self._tracker = self._make()
            while self._missed:
                self._missed[0](self._tracker)
                self._missed.popleft()
        except Exception as error:  # noqa: BLE001 - not ours, and no run ends for it
            if not self._has_failed:
                said = "%s fails, and is told later, if it does not: %s"
                logger.warning(said, self._name, error)
            self._has_failed = True
            self._not_before = time.monotonic() + RETRY_S
            self._give_up()
        else:
            self._has_failed = False

    def _give_up(self) -> None:
        """It is made anew."""
        tracker, self._tracker = self._tracker, None
        with suppress(Exception):
            if tracker is not None:
                tracker.close(None)

    def close(self, ended: Ended) -> None:
        """Tell it all, and that nothing follows."""
        self._missed.append(lambda tracker: tracker.close(ended))
        self._catch_up()
        if num_records := max(0, len(self._missed) - 1):
            logger.warning("%s lacks the last %d records", self._name, num_records)
        elif self._missed:
            logger.warning("%s was not told that the run has ended", self._name)


class Trackers:
    """All of a run, told by one thread."""

    def __init__(self, ways: Mapping[str, Callable[[], Tracker]]) -> None:
        self._all = [_Told(name, make) for name, make in ways.items()]
        self._beside = Beside("trackers")

    def go_back(self, samples: int) -> None:
        """The run goes on from here, for the first time or again."""
        self._tell(lambda tracker: tracker.go_back(samples))

    def record(self, record: Mapping[str, Any]) -> None:
        """A record of metrics.jsonl."""
        if values := scalars(record):
            samples = record["samples"]
            self._tell(lambda tracker: tracker.log(values, samples=samples))

    def _tell(self, what: Callable[[Tracker], None]) -> None:
        for told in self._all:
            self._beside.submit(partial(told.tell, what))

    def close(self, error: BaseException | None = None) -> None:
        """Return when all is told, or after a while. error: with which the run ends."""
        for told in self._all:
            self._beside.submit(partial(told.close, _ended_by(error)))
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
