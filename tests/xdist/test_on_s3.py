"""Runs whose directory is in a bucket, behind an endpoint that fails now and then."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch
from tenacity import retry, retry_if_exception_type, stop_after_delay

from datapipe.errors import UnreadableUrl
from datapipe.position import Position
from datapipe.storage import names_in, read_bytes
from tests.clusters import own_cluster
from tests.datapipe.fault_proxy import Fault, FaultProxy
from tests.recorded import Planned, Recording, recorded_topology
from tests.small_runs import NUM_TRAIN, final, run, saved_step, small_config, weights_of
from tests.xdist.test_endings import told
from xdist import checkpoint
from xdist.config import TrainConfig
from xdist.errors import RunDirectoryError, RunTaken
from xdist.interruption import Interruption
from xdist.run_directory import RunDirectory

moto_server = pytest.importorskip("moto.server")
s3fs = pytest.importorskip("s3fs")

pytestmark = [pytest.mark.faults, pytest.mark.long, pytest.mark.ray, pytest.mark.timeout(240)]

OUTAGE = range(150, 165)
"""Requests that are denied, one after the other."""
FAULTS: dict[int, Fault] = {
    **dict.fromkeys(range(0, 2000, 13), "refuse"),
    **dict.fromkeys(OUTAGE, "deny"),
}
VARIABLES = {
    "AWS_ACCESS_KEY_ID": "key",
    "AWS_SECRET_ACCESS_KEY": "secret",
    "AWS_DEFAULT_REGION": "us-east-1",
}


@dataclass(frozen=True)
class Bucket:
    """One behind a proxy."""

    proxy: FaultProxy
    url: str


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    """A new bucket at an S3 endpoint over HTTP, and a cluster whose processes know it, and this
    process drives.
    """
    name = f"bucket-{uuid.uuid4().hex}"
    server = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for variable, value in VARIABLES.items():
        monkeypatch.setenv(variable, value)
    s3fs.S3FileSystem(endpoint_url=f"http://{host}:{port}").mkdir(name)
    with FaultProxy(f"http://{host}:{port}", FAULTS, everywhere=True) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        s3fs.S3FileSystem.clear_instance_cache()
        variables = {**VARIABLES, "AWS_ENDPOINT_URL": proxy.url}
        with own_cluster(num_cpus=4, variables=variables) as cluster, cluster.connected():
            yield Bucket(proxy, f"s3://{name}")
    s3fs.S3FileSystem.clear_instance_cache()
    server.stop()


def test_a_synchronous_run_loses_no_step(tmp_path: Path, bucket: Bucket) -> None:
    """It is told to end in the middle, and goes on from the bucket."""
    url, config = f"{bucket.url}/run", small_config(tmp_path, strategy="all_reduce")
    planned = [Planned("end", 0, 20, told(os.getpid()))]
    topologies = recorded_topology(tmp_path / "first", planned)
    interruption = Interruption()
    with interruption.heard(), pytest.raises(KeyboardInterrupt):
        run(config, url, topologies=topologies, interruption=interruption)
    saved = saved_step(url)
    first = Recording(tmp_path / "first")
    assert saved == max(first.steps())
    run(config, url, topologies=recorded_topology(tmp_path / "last"))
    recording = first.followed_by(Recording(tmp_path / "last"))
    recording.check(num_samples=NUM_TRAIN, num_epochs=config.num_epochs)
    run(config, tmp_path / "local")
    assert torch.equal(weights_of(final(url)), weights_of(final(tmp_path / "local")))
    check_faults(bucket)


def take(url: str, config: TrainConfig) -> None:
    """As another process that begins to drive does; its storage may refuse meanwhile."""

    @retry(
        retry=retry_if_exception_type((RunDirectoryError, UnreadableUrl)), stop=stop_after_delay(30)
    )
    def begin() -> None:
        with RunDirectory(url, config) as run:
            run.take()

    begin()


def test_a_run_that_another_process_has_begun_to_drive_ends(tmp_path: Path, bucket: Bucket) -> None:
    url, config = f"{bucket.url}/run", small_config(tmp_path, strategy="all_reduce")
    planned = [Planned("take", 0, 20, partial(take, url, config))]
    with pytest.raises(RunTaken, match=r"s3://.*/run is driven by process \d+ on .*; give another"):
        run(config, url, topologies=recorded_topology(tmp_path / "recording", planned))
    assert 0 < saved_step(url) <= 24
    assert len(read_bytes(f"{url}/metrics.jsonl").splitlines()) < 20


@pytest.mark.by_hand
def test_an_asynchronous_run_loses_no_sample(tmp_path: Path, bucket: Bucket) -> None:
    url, config = f"{bucket.url}/run", small_config(tmp_path, strategy="push_pull")
    run(config, url)
    assert final(url).manifest.cut.position == Position(epoch=config.num_epochs)
    check_faults(bucket)


def check_faults(bucket: Bucket) -> None:
    """All of them came up; the run's records are in the bucket, and what is damaged is not."""
    url, served = f"{bucket.url}/run", bucket.proxy.served
    assert served.count("deny") == len(OUTAGE)
    assert served.count("refuse") > len(OUTAGE)
    kinds = [json.loads(line)["kind"] for line in read_bytes(f"{url}/metrics.jsonl").splitlines()]
    assert {"start", "train", "checkpoint"} <= set(kinds)
    for directory in checkpoint.directories(url):
        if checkpoint.MANIFEST in names_in(directory):
            checkpoint.Checkpoint.open(directory).verify()
