"""Shares of checkpoints that are written beside training."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import safetensors.torch
import torch

from xdist import checkpoint, patient_storage, share_writer
from xdist.share_writer import Piece, ShareWriter

SIZE = 100


class Storage:
    """Holds up whoever writes, until it is told to let them."""

    def __init__(self, store: Callable[..., None]) -> None:
        self._store = store
        self.is_open = threading.Event()

    def store(self, url: str, payload: memoryview) -> None:
        assert self.is_open.wait(30)
        self._store(url, payload)


@pytest.fixture
def storage(monkeypatch: pytest.MonkeyPatch) -> Iterator[Storage]:
    held = Storage(checkpoint._store)
    monkeypatch.setattr(checkpoint, "_store", held.store)
    yield held
    held.is_open.set()


def pieces_of(weights: torch.Tensor) -> list[Piece]:
    return [Piece(checkpoint.range_part(0, SIZE), 0, SIZE, {"weights": weights})]


def url_of(run_dir: Path, step: int) -> str:
    checkpoint.make_directory(str(run_dir))
    return checkpoint.checkpoint_url(str(run_dir), step)


def stored(url: str) -> torch.Tensor:
    [path] = Path(url).glob(f"{checkpoint.range_part(0, SIZE)}-*")
    return safetensors.torch.load(path.read_bytes())["weights"]


def test_what_is_written_is_the_state_as_it_was_when_it_was_saved(
    tmp_path: Path, storage: Storage
) -> None:
    writer, weights, urls = ShareWriter(), torch.zeros(SIZE), [url_of(tmp_path, i) for i in (1, 2)]
    for step, url in enumerate(urls, start=1):
        writer.save(step, url, pieces_of(weights.fill_(step)))
    weights.fill_(3)
    storage.is_open.set()
    for step, url in enumerate(urls, start=1):
        [part] = writer.written(step).parts
        assert part.num_bytes == Path(url, part.file).stat().st_size
        assert stored(url).eq(step).all()


def test_two_are_kept_and_no_third_one(
    tmp_path: Path, storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(share_writer, "WAIT_S", 0.05)
    writer, weights = ShareWriter(), torch.zeros(SIZE)
    for step in (1, 2, 3):
        writer.save(step, url_of(tmp_path, step), pieces_of(weights))
    storage.is_open.set()
    assert [bool(writer.written(step).parts) for step in (1, 2, 3)] == [True, True, False]
    assert not writer.written(3).is_kept
    writer.save(3, url_of(tmp_path, 3), pieces_of(weights))
    assert writer.written(3).parts


def test_the_memory_of_one_that_is_written_serves_another(tmp_path: Path) -> None:
    writer, weights = ShareWriter(), torch.zeros(SIZE)
    places = set()
    for step in range(1, 6):
        writer.save(step, url_of(tmp_path, step), pieces_of(weights))
        places |= {id(payload) for payload in writer._shares[step].payloads}
        assert writer.written(step).parts
    assert len(places) <= 1
    writer.save(6, url_of(tmp_path, 6), [Piece("other", 0, 2, {"weights": weights[:2]})])
    assert writer.written(6).parts[0].file.startswith("other-")


def test_memory_that_is_reserved_serves_the_first_one(tmp_path: Path) -> None:
    writer, weights = ShareWriter(), torch.ones(SIZE)
    for _ in range(2):
        writer.reserve(pieces_of(weights))
    writer._beside.submit(lambda: None).result()
    writer.save(1, url_of(tmp_path, 1), pieces_of(weights))
    assert writer.written(1).parts
    assert len(writer._free) == 1
    assert stored(url_of(tmp_path, 1)).eq(1).all()


def test_one_that_could_not_be_written_is_tried_again_when_that_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patient_storage, "STORING_LIMIT_S", 0.0)
    writer, url = ShareWriter(), url_of(tmp_path, 1)
    in_the_way = Path(url)
    in_the_way.touch()
    writer.save(1, url, pieces_of(torch.ones(SIZE)))
    assert [("cannot be written" in str(writer.written(1).unsaved)) for _ in range(2)] == [True] * 2
    in_the_way.unlink()
    assert writer.written(1).parts
    assert writer.written(1).parts
    assert stored(url).eq(1).all()


def test_one_that_could_not_be_written_makes_room_for_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patient_storage, "STORING_LIMIT_S", 0.0)
    writer = ShareWriter()
    for step in (1, 2, 3):
        url = url_of(tmp_path, step)
        Path(url).touch()
        writer.save(step, url, pieces_of(torch.ones(SIZE)))
        assert writer.written(step).unsaved is not None
    assert list(writer._shares) == [3]


def test_a_share_that_is_saved_again_as_it_is_written_is_written_once(
    tmp_path: Path, storage: Storage
) -> None:
    writer, weights, url = ShareWriter(), torch.ones(SIZE), url_of(tmp_path, 1)
    for _ in range(4):
        writer.save(1, url, pieces_of(weights))
    storage.is_open.set()
    assert writer.written(1).parts
