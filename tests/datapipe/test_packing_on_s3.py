"""Packing to an S3 endpoint over HTTP, from processes that do not see one another's listings."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from datapipe.packing import Packing, label_names
from datapipe.parallel_packing import pack_shards
from datapipe.storage import read_bytes
from tests.datapipe.small_sources import OPTIONS, files_in, images_in, write_photos

moto_server = pytest.importorskip("moto.server")


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A bucket of its own, which child processes find through the environment."""
    server = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    filesystem = fsspec.filesystem("s3", skip_instance_cache=True)
    filesystem.mkdir("bucket")
    fsspec.filesystem("s3").clear_instance_cache()
    yield "s3://bucket"
    fsspec.filesystem("s3").clear_instance_cache()
    server.stop()


def packing_of(photos: Path, output: str) -> Packing:
    images = images_in(photos)
    return Packing(
        images, directory=output, names=label_names(images), known_labels=None, options=OPTIONS
    )


def test_a_bucket_gets_what_a_directory_gets(bucket: str, tmp_path: Path) -> None:
    photos = write_photos(tmp_path / "photos")
    for output, num_processes in ((f"{bucket}/set", 2), (str(tmp_path / "out"), 1)):
        packing = packing_of(photos, output)
        jobs = packing.jobs()
        list(pack_shards(jobs, num_processes=num_processes, on_images=lambda _: None))
        assert packing.jobs() == []
        assert packing.finish().index.num_samples == 40
    local = files_in(tmp_path / "out")
    stored = fsspec.filesystem("s3").find("bucket/set")
    assert sorted(name.removeprefix("bucket/set/") for name in stored) == sorted(local)
    for name, content in local.items():
        assert read_bytes(f"{bucket}/set/{name}") == content
