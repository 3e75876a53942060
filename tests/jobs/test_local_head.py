"""The Ray head of one's own."""

from __future__ import annotations

import socket
import sys
import tempfile
from pathlib import Path

import pytest
from local_head import PORTS, HeadFailed, LocalHead, free_ports, ray_script

RAY_WORKER_PORTS = range(10_002, 20_000)


def test_ports_are_free_and_not_those_of_ray_workers() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", free_ports(1)[0]))
        taken.listen()
        found = free_ports(len(PORTS))
        assert taken.getsockname()[1] not in found
        assert not set(RAY_WORKER_PORTS) & set(found)
        assert len(set(free_ports(3))) == 3


@pytest.mark.ray
@pytest.mark.slow
def test_the_surroundings_of_the_user_do_not_reach_the_head(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:5")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("NO_PROXY", "example.org")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / ("long" * 10)))
    Path(tempfile.gettempdir()).mkdir()
    with LocalHead(num_cpus=1, variables={"RAY_AUTH_TOKEN": "0" * 64}) as head:
        environment = head.environment
        assert environment["RAY_AUTH_TOKEN"] == "0" * 64
        assert environment["RAY_ADDRESS"] == head.address
        assert "RAY_API_SERVER_ADDRESS" not in environment
        assert environment["no_proxy"] == environment["NO_PROXY"]
        assert environment["no_proxy"].split(",") == ["example.org", "127.0.0.1", "localhost"]
        assert environment["CUDA_VISIBLE_DEVICES"] == ""
        assert head.directory.parent == Path("/tmp")
    assert not head.directory.exists()


def test_a_head_that_ends_at_once_says_why_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "ray.py").write_text("raise SystemExit('no Ray today')")
    head = LocalHead(num_cpus=1, variables={"PYTHONPATH": str(tmp_path)})
    with pytest.raises(HeadFailed, match=r"(?s)ended with code 1 .* its log:\nno Ray today"):
        head.__enter__()
    assert not head.directory.exists()


def test_without_room_for_temporary_files_it_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
    with pytest.raises(HeadFailed, match="set TMPDIR to a directory"):
        LocalHead(num_cpus=1).__enter__()


def test_without_ray_in_its_environment_it_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(HeadFailed, match="ray is not there"):
        ray_script()
