"""Packing to an S3 endpoint over HTTP, from processes that do not see one another's listings."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from datapipe.parallel_packing import pack_shards
from datapipe.storage import read_bytes
from tests.datapipe.small_sources import packing_of

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


def test_a_bucket_gets_what_a_directory_gets(
    bucket: str, photos: Path, uninterrupted: dict[str, bytes]
) -> None:
    packing = packing_of(photos, f"{bucket}/set")
    list(pack_shards(packing.jobs(), num_processes=2, on_images=lambda _: None))
    assert packing.jobs() == []
    assert packing.finish().index.num_samples == 40
    stored = fsspec.filesystem("s3").find("bucket/set")
    assert sorted(name.removeprefix("bucket/set/") for name in stored) == sorted(uninterrupted)
    for name, content in uninterrupted.items():
        assert read_bytes(f"{bucket}/set/{name}") == content
