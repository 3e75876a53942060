"""Checkpoints: parts written by the owners of the state, and a manifest that makes them one.

A checkpoint is a directory `step-000000001234` below `<run>/checkpoints`:

- `range-<start>-<stop>-<hash>.safetensors`: one range of the flat vector (weights, average,
optimizer slots),
- `statistics-<hash>.safetensors`: running batch-norm statistics and their average,
- `manifest.json`: step, samples, position and what it counts in, layout of the flat vector, config,
versions, every part's size and SHA-256, and the SHA-256 of all this.

The manifest is written last, under another name, and renamed: without it there is no checkpoint.
Parts are named by their content: who is left of an earlier life of the run overwrites none of them.
Both strategies write this format, and a reader may ask for any range whatever ranges were written.
Only tensors and plain values are stored; nothing is pickled.
"""

from __future__ import annotations

import hashlib
import json
import logging
import platform
import re
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from datapipe.errors import UnreadableUrl
from datapipe.json_text import parse_json
from datapipe.position import Position
from datapipe.storage import (
    directory_of,
    exists,
    names_in,
    open_filesystem,
)
from xdist import patient_storage
from xdist.errors import CheckpointDamaged, RunDirectoryError, UnknownFormat, UserError
from xdist.flat import Layout
from xdist.patient_storage import fetch, patient, require
from xdist.payload import Payload

FORMAT = "xdist-checkpoint"
VERSION = 1
MANIFEST = "manifest.json"
DIRECTORY = re.compile(r"step-\d+")
BEST = "best.json"
"""In a run directory: which of its checkpoints has the best score."""
STATISTICS_PART = "statistics"
"""How the name of its file begins."""
HASH_DIGITS = 16
"""Of a part's SHA-256, in its name."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Part:
    """One file of a checkpoint. Ranges carry [start, stop) of the flat vector; the statistics carry
    (0, 0).
    """

    file: str
    start: int
    stop: int
    num_bytes: int
    sha256: str

    @property
    def is_statistics(self) -> bool:
        return self.file.startswith(STATISTICS_PART)


@dataclass(frozen=True)
class Cut:
    """A moment of the run at which all state fits together: after update `step`."""

    step: int
    num_samples: int
    """Places done since the start of training."""
    position: Position
    is_final: bool


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint says of itself."""

    cut: Cut
    layout: Layout
    parts: tuple[Part, ...]
    data: dict[str, Any]
    """What the position counts in: the training set's fingerprint, and the order of its samples."""
    config: dict[str, Any]
    versions: dict[str, str]

    @property
    def ranges(self) -> list[Part]:
        """The parts that hold ranges of the flat vector, in order."""
        parts = [part for part in self.parts if not part.is_statistics]
        return sorted(parts, key=lambda part: part.start)

    @property
    def is_complete(self) -> bool:
        """Whether the parts hold the whole flat vector and the statistics."""
        reached = 0
        for part in self.ranges:
            if part.start != reached:
                return False
            reached = part.stop
        return reached == self.layout.num_weights and len(self.ranges) < len(self.parts)

    def to_json(self) -> dict[str, Any]:
        body = {
            "format": FORMAT,
            "version": VERSION,
            "created": time.time(),
            "step": self.cut.step,
            "num_samples": self.cut.num_samples,
            "position": self.cut.position.to_json(),
            "is_final": self.cut.is_final,
            "layout": self.layout.to_json(),
            "parts": [asdict(part) for part in self.parts],
            "data": self.data,
            "config": self.config,
            "versions": self.versions,
        }
        return {**body, "sha256": _sha256_of(body)}

    @classmethod
    def from_json(cls, value: Any) -> Manifest:
        """What `to_json` wrote; anything else is a `ValueError`, `KeyError` or `TypeError`. Raises
        `UnknownFormat` for what another version of this program wrote.
        """
        if not isinstance(value, dict):
            raise TypeError(f"{type(value).__name__} instead of an object")
        body = {name: item for name, item in value.items() if name != "sha256"}
        if value.get("sha256") != _sha256_of(body):
            raise ValueError("its content is not the one whose SHA-256 it holds")
        if body["format"] != FORMAT or body["version"] != VERSION:
            raise UnknownFormat(
                f"format {body['format']!r} version {body['version']!r}; this program reads "
                f"{FORMAT!r} version {VERSION}"
            )
        cut = Cut(
            int(body["step"]),
            int(body["num_samples"]),
            Position.from_json(body["position"]),
            bool(body["is_final"]),
        )
        parts = tuple(Part(**part) for part in body["parts"])
        layout = Layout.from_json(body["layout"])
        manifest = cls(cut, layout, parts, body["data"], body["config"], body["versions"])
        if not manifest.is_complete:
            raise ValueError("its parts do not cover the flat vector")
        return manifest


def _sha256_of(value: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def is_due(before: int, after: int, *, every: int) -> bool:
    """Whether a checkpoint is due after an update that brought the samples done from `before` to
    `after`.
    """
    return before // every < after // every


def versions() -> dict[str, str]:
    """The software that writes a checkpoint."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "safetensors": safetensors.__version__,
    }


def checkpoint_url(run_dir: str, step: int) -> str:
    """Where the checkpoint of `step` lives."""
    return f"{checkpoints_url(run_dir)}/step-{step:012d}"


def checkpoints_url(run_dir: str) -> str:
    """Where the checkpoints of a run live."""
    return f"{run_dir.rstrip('/')}/checkpoints"


def make_directory(run_dir: str) -> None:
    """Where the checkpoints of a run will live: nobody makes it later, so that a node on which it
    is not there any more writes none of their parts beside it. Raises `RunDirectoryError`.
    """
    filesystem, path = open_filesystem(checkpoints_url(run_dir))
    try:
        filesystem.makedirs(path, exist_ok=True)
    except OSError as error:
        raise RunDirectoryError(
            f"{run_dir} cannot be written: {error}; choose another with --run-dir"
        ) from error


def range_part(start: int, stop: int) -> str:
    """How the name of the file begins that holds [start, stop) of the flat vector."""
    return f"range-{start:012d}-{stop:012d}"


def write_range(url: str, tensors: Mapping[str, Tensor], *, start: int, stop: int) -> Part:
    """Write one range of the flat vector into the checkpoint directory `url`. Raises
    `RunDirectoryError`.
    """
    return write(url, range_part(start, stop), Payload.of(tensors), start, stop)


def write_statistics(url: str, tensors: Mapping[str, Tensor]) -> Part:
    """Write the batch-norm statistics into the checkpoint directory `url`. Raises
    `RunDirectoryError`.
    """
    return write(url, STATISTICS_PART, Payload.of(tensors), 0, 0)


def write(url: str, name: str, payload: Payload, start: int, stop: int) -> Part:
    """Write a part into the checkpoint directory `url`. name: how that of its file begins. Raises
    `RunDirectoryError`.
    """
    content = payload.content
    digest = hashlib.sha256(content).hexdigest()
    file = f"{name}-{digest[:HASH_DIGITS]}.safetensors"
    _store(f"{url}/{file}", content)
    return Part(file, start, stop, len(content), digest)


def publish(url: str, manifest: Manifest) -> Checkpoint:
    """Make the parts in `url` a checkpoint. Raises `PartMissing`, `RunDirectoryError`."""
    assert manifest.is_complete
    for part in manifest.parts:
        require(f"{url}/{part.file}", part.num_bytes)
    _store(f"{url}/{MANIFEST}", json.dumps(manifest.to_json(), indent=1).encode())
    return Checkpoint(url, manifest)


def _store(url: str, payload: bytes | memoryview) -> None:
    """Raises `RunDirectoryError`."""
    patient_storage.store(url, payload, beneath=directory_of(directory_of(url)))


@dataclass(frozen=True)
class Checkpoint:
    """A published checkpoint. Reading verifies size and SHA-256 of what it reads
    (`CheckpointDamaged`).
    """

    url: str
    manifest: Manifest

    @classmethod
    def open(cls, url: str) -> Checkpoint:
        """Read the manifest in the directory `url`. Raises `CheckpointDamaged` when there is none,
        or no valid one, `UnknownFormat` when another version of this program wrote it.
        """
        try:
            value = parse_json(fetch(f"{url}/{MANIFEST}"))
            return cls(url, Manifest.from_json(value))
        except FileNotFoundError as error:
            raise CheckpointDamaged(f"{url}: no {MANIFEST}; not a checkpoint") from error
        except UnknownFormat as error:
            raise UnknownFormat(
                f"{url}: {error}; use that version, or another --run-dir"
            ) from error
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointDamaged(f"{url}/{MANIFEST}: not readable ({error})") from error

    def read_range(self, start: int, stop: int) -> dict[str, Tensor]:
        """Tensors [start, stop) of the flat vector by name, (stop - start,) float32 each."""
        pieces: dict[str, Tensor] = {}
        for part in self.manifest.ranges:
            low, high = max(start, part.start), min(stop, part.stop)
            if low >= high:
                continue
            for name, tensor in self._read(part).items():
                whole = pieces.setdefault(name, torch.empty(stop - start, dtype=tensor.dtype))
                whole[low - start : high - start] = tensor[low - part.start : high - part.start]
        return pieces

    def read_statistics(self) -> dict[str, Tensor]:
        """Batch-norm statistics by name, (S,) float32 each."""
        part = next(part for part in self.manifest.parts if part.is_statistics)
        return self._read(part)

    def verify(self) -> None:
        """Read every part. Raises `CheckpointDamaged` naming the first that is not what the
        manifest says.
        """
        for part in self.manifest.parts:
            self.read_bytes(part)

    def _read(self, part: Part) -> dict[str, Tensor]:
        return safetensors.torch.load(self.read_bytes(part))

    def read_bytes(self, part: Part) -> bytes:
        """A part, verified."""
        try:
            payload = fetch(f"{self.url}/{part.file}")
        except FileNotFoundError as error:
            raise CheckpointDamaged(f"{self.url}/{part.file}: missing") from error
        if len(payload) != part.num_bytes or hashlib.sha256(payload).hexdigest() != part.sha256:
            raise CheckpointDamaged(
                f"{self.url}/{part.file}: {len(payload)} bytes, which are not the "
                f"{part.num_bytes} whose SHA-256 the manifest holds"
            )
        return payload


def latest(run_dir: str) -> Checkpoint | None:
    """The newest checkpoint of a run that verifies; a damaged one is named in the log and the one
    before it taken.
    """
    for url in reversed(patient()(directories, run_dir)):
        try:
            checkpoint = Checkpoint.open(url)
            checkpoint.verify()
        except CheckpointDamaged as error:
            logger.warning("checkpoint skipped: %s", error)
        else:
            return checkpoint
    return None


def copy(source: Checkpoint, run_dir: str, *, config: dict[str, Any]) -> Checkpoint:
    """The same state in another run, of this configuration. Raises `CheckpointDamaged`,
    `RunDirectoryError`.
    """
    make_directory(run_dir)
    url = checkpoint_url(run_dir, source.manifest.cut.step)
    for part in source.manifest.parts:
        _store(f"{url}/{part.file}", source.read_bytes(part))
    cut = replace(source.manifest.cut, is_final=False)
    return publish(url, replace(source.manifest, cut=cut, config=config, versions=versions()))


def find_again(run_dir: str) -> Checkpoint:
    """The newest checkpoint of a run that has one. Raises `RunDirectoryError` where none is found,
    or none can be read, within the time that the storage is given.
    """

    def look() -> Checkpoint:
        if (found := latest(run_dir)) is None:
            raise FileNotFoundError(f"{checkpoints_url(run_dir)} has no checkpoint that verifies")
        return found

    try:
        return patient()(look)
    except (OSError, UnreadableUrl) as error:
        raise RunDirectoryError(f"no checkpoint to go on from: {error}") from error


def find(url: str) -> tuple[Checkpoint, str | None]:
    """The checkpoint at `url`, or the newest of the run at `url`, or of RUN/best the best of that
    run, verified; and its run directory if it lies in one. Raises `UserError` when there is none,
    `CheckpointDamaged`.
    """
    if url.rsplit("/", 1)[-1] == "best":
        url = _best(directory_of(url))
    if exists(f"{url}/{MANIFEST}"):
        found = Checkpoint.open(url)
        found.verify()
        run_dir = directory_of(directory_of(url))
        return found, run_dir if checkpoints_url(run_dir) == directory_of(url) else None
    newest = latest(url)
    if newest is None:
        raise UserError(f"{url}: neither a checkpoint nor a run directory with one that verifies")
    return newest, url


def _best(run_dir: str) -> str:
    if (name := best_name(run_dir)) is None:
        raise UserError(f"{run_dir}: none of its checkpoints has been scored")
    return f"{checkpoints_url(run_dir)}/{name}"


def best_name(run_dir: str) -> str | None:
    """Of the directory of the checkpoint with the best score, None where that is not known."""
    try:
        return str(parse_json(fetch(f"{run_dir}/{BEST}"))["checkpoint"])
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def directories(run_dir: str) -> list[str]:
    """Those of the checkpoints of a run, published or not, as URLs in the order of steps."""
    root = checkpoints_url(run_dir)
    return [f"{root}/{name}" for name in sorted(names_in(root)) if DIRECTORY.fullmatch(name)]


def step_of(url: str) -> int:
    """That of the checkpoint whose directory it is."""
    return int(url.rsplit("-", 1)[-1])
