"""Checkpoints: any range comes back, nothing damaged is loaded, the newest whole one counts."""

from __future__ import annotations

import json
import re
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from datapipe.position import Position
from xdist import checkpoint, patient_storage
from xdist.checkpoint import Checkpoint, Cut, Manifest
from xdist.errors import CheckpointDamaged, RunDirectoryError, UnknownFormat
from xdist.flat import FlatModel, Layout, even_ranges


def make_layout() -> Layout:
    return FlatModel(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))).layout


LAYOUT = make_layout()
SIZE = LAYOUT.num_weights
TENSORS = {name: torch.randn(SIZE) for name in ("weights", "average", "momentum")}
STATISTICS = {"statistics": torch.randn(8), "statistics_average": torch.randn(8)}


def save(run_dir: Path, *, step: int, num_parts: int = 3) -> Checkpoint:
    checkpoint.make_directory(str(run_dir))
    url = checkpoint.checkpoint_url(str(run_dir), step)
    parts = [
        checkpoint.write_range(url, cut_out(start, stop), start=start, stop=stop)
        for start, stop in even_ranges(SIZE, num_parts)
    ]
    parts.append(checkpoint.write_statistics(url, STATISTICS))
    cut = Cut(step, 10 * step, Position(1, ((0, 3), (7, 9))), is_final=False)
    manifest = Manifest(
        cut, LAYOUT, tuple(parts), {"fingerprint": "a"}, {"seed": 1}, checkpoint.versions()
    )
    return checkpoint.publish(url, manifest)


def cut_out(start: int, stop: int) -> dict[str, Tensor]:
    return {name: tensor[start:stop] for name, tensor in TENSORS.items()}


@settings(derandomize=True, deadline=None, max_examples=20)
@given(num_parts=st.integers(1, 6), edges=st.tuples(st.integers(0, SIZE), st.integers(0, SIZE)))
def test_any_range_comes_back_whatever_parts_were_written(
    tmp_path_factory: pytest.TempPathFactory, num_parts: int, edges: tuple[int, int]
) -> None:
    start, stop = sorted(edges)
    written = save(tmp_path_factory.mktemp("run"), step=3, num_parts=num_parts)
    read = Checkpoint.open(written.url).read_range(start, stop)
    if start < stop:
        assert all(torch.equal(read[name], TENSORS[name][start:stop]) for name in TENSORS)


def test_manifest_and_statistics_come_back(tmp_path: Path) -> None:
    written = save(tmp_path, step=3)
    opened = Checkpoint.open(written.url)
    assert opened == written
    statistics = opened.read_statistics()
    assert all(torch.equal(statistics[name], STATISTICS[name]) for name in STATISTICS)


def test_without_a_manifest_it_is_not_a_checkpoint(tmp_path: Path) -> None:
    written = save(tmp_path, step=3)
    Path(written.url, checkpoint.MANIFEST).unlink()
    assert checkpoint.latest(str(tmp_path)) is None
    with pytest.raises(CheckpointDamaged, match=r"no manifest.json; not a checkpoint"):
        Checkpoint.open(written.url)


def test_an_incomplete_set_of_parts_is_known_as_such(tmp_path: Path) -> None:
    manifest = save(tmp_path, step=3).manifest
    for number in range(len(manifest.parts)):
        parts = manifest.parts[:number] + manifest.parts[number + 1 :]
        lacking = Manifest(manifest.cut, manifest.layout, parts, {"fingerprint": "a"}, {}, {})
        assert not lacking.is_complete
    assert manifest.is_complete


def names() -> list[str]:
    ranges = [checkpoint.range_part(start, stop) for start, stop in even_ranges(SIZE, 3)]
    return [*ranges, checkpoint.STATISTICS_PART]


@pytest.mark.parametrize("name", names())
@pytest.mark.parametrize("damage", ["flip", "truncate", "delete"])
def test_a_damaged_part_is_named_and_the_one_before_is_taken(
    tmp_path: Path, name: str, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path, step=3)
    [path] = Path(save(tmp_path, step=5).url).glob(f"{name}-*")
    payload = bytearray(path.read_bytes())
    if damage == "flip":
        payload[len(payload) // 2] ^= 1
        path.write_bytes(payload)
    elif damage == "truncate":
        path.write_bytes(payload[:-1])
    else:
        path.unlink()
    found = checkpoint.latest(str(tmp_path))
    assert found is not None
    assert found.manifest.cut.step == 3
    assert path.name in caplog.text


@settings(derandomize=True, deadline=None, max_examples=300)
@given(
    number=st.integers(0, 4), place=st.floats(0, 1, exclude_max=True), flipped=st.integers(0, 255)
)
def test_whatever_byte_is_flipped_and_wherever_a_file_ends_nothing_damaged_is_loaded(
    tmp_path_factory: pytest.TempPathFactory, number: int, place: float, flipped: int
) -> None:
    """flipped: bits of a byte, but of space, which may become another one; none: the file ends
    there.
    """
    written = save(tmp_path_factory.mktemp("run"), step=3)
    file = [*(part.file for part in written.manifest.parts), checkpoint.MANIFEST][number]
    path = Path(written.url, file)
    payload = bytearray(path.read_bytes())
    places = [i for i, byte in enumerate(payload) if byte not in b" \n"]
    at = places[int(place * len(places))]
    payload[at:] = [payload[at] ^ flipped, *payload[at + 1 :]] if flipped else b""
    path.write_bytes(payload)
    with pytest.raises(CheckpointDamaged, match=re.escape(str(path))):
        Checkpoint.open(written.url).verify()


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"format": "xdist-checkpoint"}'])
def test_a_damaged_manifest_is_refused(tmp_path: Path, text: str) -> None:
    written = save(tmp_path, step=3)
    Path(written.url, checkpoint.MANIFEST).write_text(text)
    with pytest.raises(CheckpointDamaged, match="not readable"):
        Checkpoint.open(written.url)


def test_another_version_is_refused_with_both_versions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as future:
        future.setattr(checkpoint, "VERSION", 99)
        written = save(tmp_path, step=3)
    match = r"version 99; this program reads .* version 1; use that version, or another --run-dir"
    with pytest.raises(UnknownFormat, match=match):
        Checkpoint.open(written.url)
    with pytest.raises(UnknownFormat):
        checkpoint.latest(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "value"), [("position", {"epoch": 7, "done": []}), ("num_samples", 0), ("parts", [])]
)
def test_a_manifest_is_protected_itself(tmp_path: Path, name: str, value: object) -> None:
    path = Path(save(tmp_path, step=3).url, checkpoint.MANIFEST)
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))
    with pytest.raises(CheckpointDamaged, match="SHA-256"):
        Checkpoint.open(str(path.parent))


def test_parts_must_cover_the_vector(tmp_path: Path) -> None:
    written = save(tmp_path, step=3)
    parts = written.manifest.parts[1:]
    value = replace(written.manifest, parts=parts).to_json()
    Path(written.url, checkpoint.MANIFEST).write_text(json.dumps(value))
    with pytest.raises(CheckpointDamaged, match="do not cover the flat vector"):
        Checkpoint.open(written.url)


def test_a_part_that_cannot_be_written_names_file_and_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patient_storage, "STORING_LIMIT_S", 0.0)
    (tmp_path / "file").touch()
    with pytest.raises(
        RunDirectoryError, match=r"statistics-\w+.safetensors cannot be written from"
    ):
        checkpoint.write_statistics(f"{tmp_path}/file/step-1", STATISTICS)


def test_a_part_is_written_when_the_storage_is_back(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "away").mkdir()
    back = threading.Timer(0.3, (tmp_path / "away").rename, [tmp_path / "here"])
    back.start()
    part = checkpoint.write_statistics(f"{tmp_path}/here/step-1", STATISTICS)
    back.join()
    assert (tmp_path / "here" / "step-1" / part.file).stat().st_size == part.num_bytes
    assert "Retrying" in caplog.text


def test_nothing_is_written_beside_a_file_system_that_was_unmounted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patient_storage, "STORING_LIMIT_S", 0.0)
    with pytest.raises(RunDirectoryError, match=r"run/checkpoints is not there; was its file"):
        checkpoint.write_statistics(f"{tmp_path}/run/checkpoints/step-1", STATISTICS)
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_that_must_be_there_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = save(tmp_path / "away", step=1)
    back = threading.Timer(0.3, (tmp_path / "away").rename, [tmp_path / "run"])
    back.start()
    assert checkpoint.find_again(str(tmp_path / "run")).manifest == saved.manifest
    back.join()
    monkeypatch.setattr(patient_storage, "STORING_LIMIT_S", 0.0)
    with pytest.raises(RunDirectoryError, match="away/checkpoints has no checkpoint that verifies"):
        checkpoint.find_again(str(tmp_path / "away"))


@pytest.mark.parametrize(
    ("before", "after", "expected"), [(0, 9, False), (9, 10, True), (10, 19, False), (9, 31, True)]
)
def test_a_checkpoint_is_due_when_a_multiple_is_crossed(
    before: int, after: int, expected: bool
) -> None:
    assert checkpoint.is_due(before, after, every=10) is expected
