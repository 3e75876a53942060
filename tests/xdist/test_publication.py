"""Checkpoints whose parts arrive in any order, or never."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from datapipe.position import Position
from tests.small_runs import small_config
from tests.xdist.test_checkpoint import save
from xdist import patient_storage
from xdist.checkpoint import Cut, Part
from xdist.config import TrainConfig
from xdist.errors import PartMissing
from xdist.publication import Publications, Published
from xdist.run_directory import RunDirectory


def config_of(directory: Path) -> TrainConfig:
    config = small_config(directory, strategy="push_pull")
    return replace(config, checkpoint=replace(config.checkpoint, keep=1))


class Owners:
    """Those who write the parts of checkpoints."""

    def __init__(self, run_dir: Path) -> None:
        config = config_of(run_dir)
        self.run = RunDirectory(str(run_dir), config)
        self.publications = Publications(self.run, config, save_every_samples=10)
        self.first = save(run_dir, step=0).manifest
        self._run_dir = run_dir

    def write(self, step: int) -> tuple[Cut, tuple[Part, ...]]:
        parts = save(self._run_dir, step=step).manifest.parts
        (self.directory(step) / "manifest.json").unlink()
        return Cut(step, 10 * step, Position(), is_final=False), parts

    def tell(self, cut: Cut, parts: tuple[Part, ...]) -> Published | None:
        self.publications.add(cut, parts, previous=self.first)
        return self.publications.take(waits=True)

    def directory(self, step: int) -> Path:
        return self._run_dir / "checkpoints" / f"step-{step:012d}"


@pytest.fixture
def owners(tmp_path: Path) -> Iterator[Owners]:
    owners = Owners(tmp_path)
    with owners.run:
        yield owners


def test_one_is_there_when_its_last_part_is(owners: Owners) -> None:
    cut, (last, *parts) = owners.write(1)
    assert owners.tell(cut, tuple(parts)) is None
    published = owners.tell(cut, (last,))
    assert published is not None
    assert published.checkpoint.manifest.cut == cut


@pytest.mark.parametrize("is_final", [False, True])
def test_one_whose_part_is_not_there_is_none_and_holds_up_none(
    owners: Owners, monkeypatch: pytest.MonkeyPatch, is_final: bool
) -> None:
    """As where each node has a run directory of its own. The last one is tried again."""
    monkeypatch.setattr(patient_storage, "STORING_LIMIT_S", 0.0)
    cut, parts = owners.write(1)
    part = owners.directory(1) / parts[0].file
    part.rename(part.with_name("away"))
    with pytest.raises(PartMissing, match="was written by one of the nodes and is not there"):
        owners.tell(replace(cut, is_final=is_final), parts)
    assert not (owners.directory(1) / "manifest.json").exists()
    assert owners.publications.is_busy == is_final
    if is_final:
        part.with_name("away").rename(part)
        with suppress(PartMissing):  # The next try may have begun before.
            owners.publications.take(waits=True)
        owners.publications.take(waits=True)
        assert (owners.directory(1) / "manifest.json").exists()
    else:
        published = owners.tell(*owners.write(2))
        assert published is not None
        assert published.checkpoint.manifest.cut.step == 2
    owners.publications.close()


def test_one_that_lacks_a_part_is_given_up_when_two_later_ones_are_there(owners: Owners) -> None:
    unfinished, (_, *parts) = owners.write(1)
    assert owners.tell(unfinished, tuple(parts)) is None
    are_there = []
    for step in (2, 3, 4):
        assert owners.tell(*owners.write(step)) is not None
        tidied = threading.Event()
        owners.publications.tidy(newest=step, scoring=set(), then=tidied.set)
        assert tidied.wait(10)
        are_there.append(owners.directory(1).exists())
    assert are_there == [True, False, False]
