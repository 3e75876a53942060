"""Images wherever they lie."""

from __future__ import annotations

import tarfile
from pathlib import Path

import fsspec
import pytest

from datapipe.errors import DataError
from datapipe.loose_images import loose_images
from tests.datapipe.file_server import FileServer
from tests.datapipe.small_sets import encode, picture


def fill(folder: Path) -> None:
    """Two images in it, one below, one in a tar, and something else."""
    (folder / "below").mkdir(parents=True)
    for number, name in enumerate(("b.jpg", "a.png", "below/c.JPEG")):
        (folder / name).write_bytes(payload(number))
    (folder / "notes.txt").write_text("no image")
    with tarfile.open(folder / "shard.tar", "w") as tar:
        tar.add(folder / "b.jpg", "000001.jpg")
        tar.add(folder / "notes.txt", "000001.txt")


def payload(number: int) -> bytes:
    return encode(picture(number))


def test_a_folder_has_those_below_and_in_its_shards(tmp_path: Path) -> None:
    fill(tmp_path)
    images = list(loose_images(str(tmp_path)))
    names = [str(Path(image.name).relative_to(tmp_path)) for image in images]
    assert names == ["a.png", "b.jpg", "below/c.JPEG", "shard.tar/000001.jpg"]
    assert [image.read() for image in images] == [payload(number) for number in (1, 0, 2, 0)]


def test_one_file_is_one_image(tmp_path: Path) -> None:
    fill(tmp_path)
    [image] = loose_images(str(tmp_path / "b.jpg"))
    assert image.read() == payload(0)
    [of_tar] = loose_images(str(tmp_path / "shard.tar"))
    assert of_tar.read() == payload(0)


def test_where_there_are_none_it_says_so(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty: holds no images"):
        loose_images(str(tmp_path / "empty"))
    with pytest.raises(DataError, match="there is no such file or folder"):
        loose_images(str(tmp_path / "absent.jpg"))


def test_a_damaged_shard_of_a_folder_costs_no_other_image(tmp_path: Path) -> None:
    fill(tmp_path)
    (tmp_path / "broken.tar").write_bytes(b"no tar" * 200)
    images = {Path(image.name).name: image for image in loose_images(str(tmp_path))}
    assert set(images) == {"a.png", "b.jpg", "c.JPEG", "broken.tar", "000001.jpg"}
    with pytest.raises(DataError, match=r"broken\.tar"):
        images["broken.tar"].read()


def test_a_folder_in_a_bucket_has_those_below_too(tmp_path: Path) -> None:
    fill(tmp_path)
    bucket = f"memory://{tmp_path.name}"
    filesystem = fsspec.filesystem("memory")
    filesystem.put(f"{tmp_path}/", f"/{tmp_path.name}/", recursive=True)
    filesystem.pipe(f"/{tmp_path.name}-blob", payload(3))
    names = [image.name.removeprefix(bucket) for image in loose_images(bucket)]
    assert names == ["/a.png", "/b.jpg", "/below/c.JPEG", "/shard.tar/000001.jpg"]
    [blob] = loose_images(f"{bucket}-blob")
    assert blob.read() == payload(3)
    with pytest.raises(DataError, match="holds no images"):
        loose_images(f"{bucket}-absent")


def test_urls_are_read_where_they_lie(tmp_path: Path) -> None:
    fill(tmp_path)
    with FileServer(tmp_path) as server:
        images = list(loose_images(server.url))
        names = [image.name.removeprefix(server.url) for image in images]
        assert names == ["/a.png", "/b.jpg", "/shard.tar/000001.jpg"]
        assert [images[number].read() for number in (1, 2)] == [payload(0)] * 2
        with pytest.raises(DataError, match="there is no such file"):
            loose_images(f"{server.url}/absent.jpg")
