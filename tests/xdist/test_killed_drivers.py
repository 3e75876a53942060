"""Drivers that are killed at any of their calls: nothing of them is left, and the run goes on."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import uuid
from collections import defaultdict
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest
import torch
from local_head import LocalHead

from datapipe.position import Position, Span
from datapipe.storage import names_in
from tests.clusters import ROOT, wait_until
from tests.driver_process import Request
from tests.recorded import Recording
from tests.small_runs import NUM_TRAIN, final, records, small_config, weights_of
from xdist import checkpoint
from xdist.config import TrainConfig

pytestmark = [pytest.mark.ray, pytest.mark.timeout(240)]

SHARED_MEMORY = Path("/dev/shm")
NUM_SEEDS = {"all_reduce": (3, 18), "push_pull": (2, 12)}
"""In continuous integration, and by hand."""


def seeds() -> list[pytest.ParameterSet]:
    return [
        pytest.param(
            strategy,
            seed,
            marks=pytest.mark.long if seed < num_usual else pytest.mark.by_hand,
        )
        for strategy, (num_usual, num_all) in NUM_SEEDS.items()
        for seed in range(num_all)
    ]


@dataclass(frozen=True)
class Undisturbed:
    """A run of one life."""

    directory: Path
    config: TrainConfig
    num_calls: int
    """Of functions of xdist, in its driver."""


@pytest.fixture(scope="module")
def undisturbed(
    cluster: LocalHead, tmp_path_factory: pytest.TempPathFactory
) -> defaultdict[str, Undisturbed]:
    """By strategy."""

    class Runs(defaultdict[str, Undisturbed]):
        def __missing__(self, strategy: str) -> Undisturbed:
            directory = tmp_path_factory.mktemp(strategy)
            config = small_config(directory, strategy=strategy)
            num_calls = live(cluster, directory, config)
            assert num_calls is not None
            self[strategy] = Undisturbed(directory, config, num_calls)
            return self[strategy]

    return Runs()


def live(
    cluster: LocalHead, directory: Path, config: TrainConfig, *, dies_at: int | None = None
) -> int | None:
    """One life of the run in this directory, and the end of all its processes; the calls of its
    driver, None where it was killed.
    """
    recording = directory / ("first" if dies_at is not None else "last")
    recording.mkdir()
    marker, shared = f"XDIST_LIFE_{uuid.uuid4().hex}", set(SHARED_MEMORY.iterdir())
    request = Request(
        config.to_json(), str(directory / "run"), str(recording), marker, dies_at=dies_at
    )
    driver = subprocess.run(
        [sys.executable, "-m", "tests.driver_process", json.dumps(asdict(request))],
        cwd=ROOT,
        env=cluster.environment,
        stdout=subprocess.PIPE,
        timeout=120,
        text=True,
    )
    wait_until(lambda: "none" if not processes_with(marker) else None)
    assert not [file for file in set(SHARED_MEMORY.iterdir()) - shared if not is_held(file)]
    if driver.returncode == -signal.SIGKILL:
        return None
    assert driver.returncode == 0
    return int(driver.stdout.splitlines()[-1])


def is_held(file: Path) -> bool:
    """Whether a process has it, as those of other runs have theirs."""
    for directory in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            opened = {os.readlink(descriptor) for descriptor in (directory / "fd").iterdir()}
            if str(file) in opened or str(file) in (directory / "maps").read_text():
                return True
    return not file.exists()


def processes_with(variable: str) -> list[int]:
    """Those of this machine that have an environment variable."""
    found = []
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            environment = (directory / "environ").read_bytes()
        except OSError:
            continue
        if variable.encode() in environment and int(directory.name) != os.getpid():
            found.append(int(directory.name))
    return found


@pytest.mark.parametrize(("strategy", "seed"), seeds())
def test_a_run_whose_driver_is_killed_goes_on_as_if_nothing_had_happened(
    tmp_path: Path,
    cluster: LocalHead,
    undisturbed: defaultdict[str, Undisturbed],
    strategy: str,
    seed: int,
) -> None:
    whole = undisturbed[strategy]
    dies_at = random.Random(seed).randrange(1, whole.num_calls)
    config = whole.config
    killed = live(cluster, tmp_path, config, dies_at=dies_at)
    saved = checkpoint.latest(str(tmp_path / "run"))
    if killed is not None:  # It made fewer calls than the other one, and came to its end.
        assert saved is not None
        assert saved.manifest.cut.is_final
        return
    at = Position() if saved is None else saved.manifest.cut.position
    live(cluster, tmp_path, config)
    starts = records(tmp_path / "run", "start")
    assert starts[-1]["step"] == (0 if saved is None else saved.manifest.cut.step)
    for directory in checkpoint.directories(str(tmp_path / "run")):
        if checkpoint.MANIFEST in names_in(directory):
            checkpoint.Checkpoint.open(directory).verify()
    if strategy == "all_reduce":
        check_steps(whole.directory, tmp_path)
        expected = weights_of(final(whole.directory / "run"))
        assert torch.equal(weights_of(final(tmp_path / "run")), expected)
    else:
        check_places(tmp_path, at=at, num_epochs=config.num_epochs)


def check_steps(whole: Path, directory: Path) -> None:
    """Both lives made the steps of the whole run, of the same samples and to the same bits."""
    expected = steps_of(Recording(whole / "last"))
    first, last = (steps_of(Recording(directory / life)) for life in ("first", "last"))
    assert {**first, **last} == expected
    assert all(step == expected[number] for number, step in first.items())


def steps_of(recording: Recording) -> dict[int, tuple[list[int], set[str]]]:
    """Step -> its samples, and the weights that it led to."""
    samples, weights = defaultdict[int, list[int]](list), defaultdict[int, set[str]](set)
    for line in recording.tried:
        samples[line["step"]] += line["ids"]
    for line in recording.applied:
        weights[line["step"]].add(line["weights"])
    return {step: (sorted(samples[step]), weights[step]) for step in weights}


def check_places(directory: Path, *, at: Position, num_epochs: int) -> None:
    """The last life pushed each place that the checkpoint at which it began lacks, once; what the
    first one has pushed before that checkpoint is in it.
    """
    assert final(directory / "run").manifest.cut.position == Position(epoch=num_epochs)
    pushed = [span for _, span in committed(directory / "last")]
    done = at.with_done(pushed, num_samples=NUM_TRAIN)
    assert done == Position(epoch=num_epochs)
    start = records(directory / "run", "start")[-1]["step"]
    before = [span for version, span in committed(directory / "first") if version <= start]
    known = Position().with_done(before, num_samples=NUM_TRAIN)
    assert known.num_seen(NUM_TRAIN) <= at.num_seen(NUM_TRAIN)
    for epoch in range(num_epochs):
        lacking = set(places(at.remaining(epoch, num_samples=NUM_TRAIN)))
        assert lacking.isdisjoint(places(span for span in before if span.epoch == epoch))


def committed(directory: Path) -> list[tuple[int, Span]]:
    """Versions and spans of the pushes of a life."""
    lines = [
        json.loads(line)
        for path in directory.glob("committed-*.jsonl")
        for line in path.read_text().splitlines()
    ]
    return [(line["version"], Span(*span)) for line in lines for span in line["spans"]]


def places(spans: Iterable[Span]) -> list[int]:
    return [place for span in spans for place in range(span.start, span.stop)]
