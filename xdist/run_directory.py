"""RunDirectory: what a run leaves behind, apart from its checkpoints.

    config.json         the whole configuration, once all that it names was found and fits
    metrics.jsonl       one record a line: start, train, group, evaluation, checkpoint, recovery
    quarantine.jsonl    the samples that could not be decoded
    log.txt             the driver's log
    tensorboard/        event files, if it is among the trackers
    curves.png          loss, score and throughput against samples
    summary.json        how the run ended
    owner.json          of a remote one, the process that drives the run
    prometheus_targets.json   where the driver's metrics are, while it runs
    profile/            trace.json.gz, of torch's profiler, and steps.txt, if the run was profiled
    checkpoints/        see checkpoint.py

A remote run directory has a local twin, which is uploaded whenever `sync` is called. A local one
belongs to one process at a time, by a lock that ends with the process. A remote one belongs to who
has begun to drive the run last, as owner.json says: for a driver that is lost from sight nobody
waits.
"""

from __future__ import annotations

import fcntl
import json
import logging
import math
import os
import platform
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from datapipe.errors import CorruptSample, UnreadableUrl
from datapipe.json_text import parse_json
from datapipe.storage import absolute, read_bytes, write_bytes
from xdist.config import TrainConfig
from xdist.errors import RunDirectoryError, RunTaken
from xdist.line_file import LineFile
from xdist.patient_storage import fetch
from xdist.run_records import parsed, thinned, whole

if TYPE_CHECKING:
    from xdist.profiling import Profile  # With torch.

logger = logging.getLogger(__name__)

CONFIG, METRICS, QUARANTINE, LOG, CURVES = (
    "config.json", "metrics.jsonl", "quarantine.jsonl", "log.txt", "curves.png",
)  # fmt: skip
PROFILE = "profile"
LOCK, OWNER = ".lock", "owner.json"
CURVES_EVERY_S = 30.0
DRAWN_RECORDS = 4000
"""Of how a run trained: a line has fewer pixels, and all those of a month would take a GB."""
PLACE = ("shard", "key", "offset")
SAMPLE = {"shard": str, "key": str, "offset": int, "reason": str}
"""A line of quarantine.jsonl."""
OPERATION = (
    "cluster",
    "num_workers",
    "num_servers",
    "report_every_steps",
    "run_dir",
    "profile",
    "trackers",
    "compute.channels_last",
    "compute.compile",
    "compute.cuda_graphs",
    "compute.fused_optimizer",
    "data.max_bad_samples",
    "data.read_threads",
    "data.read_ahead_mb",
    "data.read_retries",
    "data.read_timeout_s",
    "data.cache_dir",
    "data.cache_gb",
    "data.decode_threads",
    "data.prefetch_batches",
    "evaluation.num_cpus",
    "evaluation.num_gpus",
    "checkpoint.final_save_s",
    "checkpoint.max_age_s",
)
"""Fields that say how a run is carried out, not which run it is. Those of `compute` among them
change numbers within rounding, as the number of workers does.
"""
MAY_CHANGE = (
    *OPERATION,
    "strategy",
    "num_epochs",
    "max_steps",
    "num_lanes",
    "compute",
    "compress_gradients",
    "bn_group",
    "on_resize",
    "servers",
    "deterministic",
    "checkpoint",
    "evaluation",
    "data.evaluation",
)
"""Fields that may be given anew when a run is resumed in its directory."""


def identity(config: TrainConfig) -> dict[str, Any]:
    """The fields that tell one run from another, as `section.field` -> value."""
    values = dict(_leaves(json.loads(json.dumps(config.to_json()))))
    return {name: value for name, value in values.items() if not _is_among(name, OPERATION)}


def fields_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """All fields of a config.json, as `section.field` -> value."""
    return dict(_leaves(dict(config)))


class RunDirectory:
    """Opens or creates the directory at `url`. Raises `RunDirectoryError` when that cannot be, or
    when it holds a run of another configuration.
    """

    def __init__(self, url: str, config: TrainConfig) -> None:
        self.url = absolute(url)
        self._drawn = -math.inf
        self._is_remote = "://" in self.url
        self._token = secrets.token_hex(16)
        self._is_taken = False
        """Whether another process has taken a remote one since."""
        self.was_begun = False
        """Whether a run of this configuration had all that it needs when it began."""
        try:
            self.local = (
                Path(tempfile.mkdtemp(prefix="xdist-run-")) if self._is_remote else Path(self.url)
            )
            self.local.mkdir(parents=True, exist_ok=True)
            self._metrics = LineFile(self.local / METRICS)
            self._quarantine = LineFile(self.local / QUARANTINE)
            self._lock = (self.local / LOCK).open("w")
        except OSError as error:
            raise self._not_writable(error) from error
        try:
            with self.told_of_refusals():
                self._open(config)
        except BaseException:
            self.close()
            raise

    def _open(self, config: TrainConfig) -> None:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._fetch()
            self._check_config(config)
            self._metrics.end_last_line()
            self._quarantine.end_last_line()
            self._listed = self._read_quarantine()
            self._upload()
        except BlockingIOError as error:
            raise RunDirectoryError(
                f"{self.url} is in use by a run that is under way; wait for it, end it, "
                "or choose another --run-dir"
            ) from error

    @contextmanager
    def told_of_refusals(self) -> Iterator[None]:
        """Within the block an `OSError` of what is written there becomes a `RunDirectoryError`."""
        try:
            yield
        except OSError as error:
            raise self._not_writable(error) from error

    def _not_writable(self, error: OSError) -> RunDirectoryError:
        return RunDirectoryError(
            f"run_dir {self.url} cannot be written: {error}; choose another with --run-dir"
        )

    def take(self) -> None:
        """A run begins here: another process that drives one in this remote directory ends when it
        saves next.
        """
        if self._is_remote:
            facts = {"token": self._token, "host": platform.node(), "process": os.getpid()}
            with self.told_of_refusals():  # Not in the twin, with which it would be uploaded again.
                write_bytes(f"{self.url}/{OWNER}", json.dumps(facts).encode())

    def check_owned(self) -> None:
        """Raise `RunTaken` where another process has taken this remote directory since; it is not
        synced any more. Raises `RunDirectoryError` where that cannot be known now.
        """
        if not self._is_remote:
            return
        try:
            owner = parse_json(fetch(f"{self.url}/{OWNER}"))
            found, who = owner["token"], f"process {owner['process']} on {owner['host']}"
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            logger.warning("%s/%s says nothing, and is written anew", self.url, OWNER)
            self.take()
            return
        except (OSError, UnreadableUrl) as error:
            raise RunDirectoryError(f"{self.url}/{OWNER} cannot be read: {error}") from error
        if found != self._token:
            self._is_taken = True
            raise RunTaken(
                f"{self.url} is driven by {who} by now, which has begun later; this run ends, and "
                "leaves it to that one; give another --run-dir to have both"
            )

    @property
    def log(self) -> Path:
        return self.local / LOG

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give the directory free."""
        self._lock.close()
        if self._is_remote:
            shutil.rmtree(self.local)

    def store(self, name: str, value: dict[str, Any]) -> None:
        """Write a JSON file; a crash leaves the old one or the new one. Raises
        `RunDirectoryError`.
        """
        text = json.dumps(value, indent=1).encode()
        with self.told_of_refusals():
            write_bytes(str(self.local / name), text)
            if self._is_remote:
                write_bytes(f"{self.url}/{name}", text)

    def store_profile(self, profile: Profile) -> None:
        """Write what was seen of some steps; another one, of a run that was resumed, replaces
        it.
        """
        table = profile.times.table() + "\n"
        write_bytes(f"{self.url}/{PROFILE}/trace.json.gz", profile.trace)
        write_bytes(f"{self.url}/{PROFILE}/steps.txt", table.encode())
        logger.info("profile written url=%s/%s\n%s", self.url, PROFILE, table.rstrip())

    def record(self, **values: Any) -> None:
        """Append a record to metrics.jsonl."""
        self._metrics.append(values)

    def records(self, *, most_of_training: int | None = None) -> list[dict[str, Any]]:
        """All records, in order; a last line that a crash cut short is left out. most_of_training:
        of a longer run only so many of those that tell how it trained, evenly spread.
        """
        with (self.local / METRICS).open(errors="replace") as file:
            num_lines = sum(1 for _ in file) if most_of_training else 0
            every = 1 + num_lines // most_of_training if most_of_training else 1
            file.seek(0)
            # What is left out is not parsed, which would take seconds after a month.
            return list(parsed(thinned(file, every=every)))

    def quarantine(self, samples: Iterable[CorruptSample]) -> tuple[CorruptSample, ...]:
        """List samples in quarantine.jsonl, each once however often it is met. Returns all that are
        listed.
        """
        for sample in samples:
            place = (sample.shard, sample.key, sample.offset)
            if place not in self._listed:
                self._listed[place] = sample
                entry = {**dict(zip(PLACE, place, strict=True)), "reason": sample.reason}
                self._quarantine.append(entry)
        return tuple(self._listed.values())

    def _read_quarantine(self) -> dict[tuple[str, str, int], CorruptSample]:
        path = self._quarantine.path
        lines = path.read_text(errors="replace").splitlines() if path.exists() else []
        return {
            (entry["shard"], entry["key"], entry["offset"]): CorruptSample(**entry)
            for entry in parsed(lines)
            if {name: type(value) for name, value in entry.items()} == SAMPLE
        }

    def sync(self, *, is_last: bool = True) -> None:
        """Draw the curves anew, and upload everything when the directory is remote. Before the last
        time they are drawn only now and then, as that takes a core for a second.
        """
        self._metrics.flush()
        self._quarantine.flush()
        now = time.monotonic()
        if is_last or now - self._drawn > CURVES_EVERY_S:
            from xdist import charts  # With matplotlib: most of a second, that no start waits for.

            records = whole(self.records(most_of_training=DRAWN_RECORDS))
            charts.draw_curves(records, self.local / CURVES)
            self._drawn = time.monotonic()
        self._upload()

    def _upload(self) -> None:
        if self._is_remote and not self._is_taken:
            for file in self.local.rglob("*"):
                if file.name != LOCK and file.is_file():
                    name = file.relative_to(self.local).as_posix()
                    write_bytes(f"{self.url}/{name}", file.read_bytes())

    def _fetch(self) -> None:
        if self._is_remote:
            for name in (CONFIG, METRICS, QUARANTINE, LOG):
                try:
                    (self.local / name).write_bytes(read_bytes(f"{self.url}/{name}"))
                except FileNotFoundError:
                    continue

    def _check_config(self, config: TrainConfig) -> None:
        path = self.local / CONFIG
        self.was_begun = path.exists()
        if not self.was_begun:
            return
        try:
            stored = fields_of(parse_json(path.read_bytes()))
        except (TypeError, ValueError) as error:
            raise RunDirectoryError(
                f"{path} is not readable ({error}); choose another --run-dir"
            ) from error
        for name, value in identity(config).items():
            was = stored.get(name, value)  # A field that is new has had its default.
            if not _is_among(name, MAY_CHANGE) and was != value:
                raise RunDirectoryError(
                    f"{self.url} holds a run with {name} = {was!r}, not {value!r}; "
                    "choose another --run-dir, or give the same configuration to resume it"
                )


def _is_among(name: str, fields: tuple[str, ...]) -> bool:
    """Whether the name is one of the fields, or below one."""
    return any(name == field or name.startswith(f"{field}.") for field in fields)


def _leaves(value: dict[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for name, item in value.items():
        if isinstance(item, dict):
            yield from _leaves(item, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", item
