"""The cache on disk: bounded, shared, checked, and never the reason why a read fails."""

from __future__ import annotations

import logging
import signal
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from datapipe.block_cache import BlockCache


def size_of(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.glob("??/*") if path.is_file())


def payload(number: int, size: int = 1000) -> bytes:
    return bytes([number % 256]) * size


def python(code: str, *arguments: str) -> subprocess.Popen[str]:
    """Another process of the machine."""
    prelude = "import sys, os, signal, resource\nfrom datapipe.block_cache import BlockCache\n"
    return subprocess.Popen(
        [sys.executable, "-c", prelude + code, *arguments],
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )


def content(cache: BlockCache, name: str) -> bytes | None:
    found = cache.get(name)
    return None if found is None else bytes(found)


def held(cache: BlockCache, numbers: range) -> list[int]:
    return [number for number in numbers if content(cache, f"{number}") == payload(number)]


def test_what_was_put_survives_a_restart(tmp_path: Path) -> None:
    BlockCache(str(tmp_path), max_bytes=10_000).put("name", b"content")
    again = BlockCache(str(tmp_path), max_bytes=10_000)
    assert content(again, "name") == b"content"
    assert content(again, "other name") is None


def test_what_was_not_used_for_longest_makes_room(tmp_path: Path) -> None:
    cache = BlockCache(str(tmp_path), max_bytes=4200)
    for number in range(4):
        cache.put(f"{number}", payload(number))
    assert cache.get("0") is not None
    cache.put("4", payload(4))
    assert size_of(tmp_path) <= 4200
    assert held(cache, range(5)) == [0, 3, 4]


def test_the_order_of_use_survives_a_restart(tmp_path: Path) -> None:
    for number in (2, 0, 1):
        BlockCache(str(tmp_path), max_bytes=3300).put(f"{number}", payload(number))
    cache = BlockCache(str(tmp_path), max_bytes=3300)
    cache.put("3", payload(3))
    assert held(cache, range(4)) == [1, 3]


def test_a_smaller_bound_holds_from_the_start(tmp_path: Path) -> None:
    cache = BlockCache(str(tmp_path), max_bytes=100_000)
    for number in range(10):
        cache.put(f"{number}", payload(number))
    BlockCache(str(tmp_path), max_bytes=5000)
    assert 0 < size_of(tmp_path) <= 5000


def test_what_could_never_have_room_is_not_kept(tmp_path: Path) -> None:
    cache = BlockCache(str(tmp_path), max_bytes=5000)
    cache.put("small", payload(0))
    cache.put("large", payload(1, size=5000))
    assert content(cache, "large") is None
    assert content(cache, "small") == payload(0)


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "foreign"])
def test_a_damaged_file_is_a_miss_and_is_replaced(tmp_path: Path, damage: str) -> None:
    cache = BlockCache(str(tmp_path), max_bytes=10_000)
    cache.put("name", payload(1))
    (path,) = tmp_path.glob("??/*.range")
    written = path.read_bytes()
    path.write_bytes(
        {
            "cut": written[:-1],
            "flipped": written[:-1] + bytes([written[-1] ^ 1]),
            "empty": b"",
            "foreign": b"x" * len(written),
        }[damage]
    )
    assert content(cache, "name") is None
    cache.put("name", payload(1))
    assert content(cache, "name") == payload(1)


def test_files_of_others_in_the_directory_stay(tmp_path: Path) -> None:
    (tmp_path / "ab").mkdir()
    foreign = [tmp_path / "notes.txt", tmp_path / "ab" / "picture.jpg"]
    for path in foreign:
        path.write_bytes(b"x" * 10_000)
    cache = BlockCache(str(tmp_path), max_bytes=2200)
    for number in range(5):
        cache.put(f"{number}", payload(number))
    assert all(path.exists() for path in foreign)
    assert held(cache, range(5))


@pytest.mark.parametrize("max_bytes", [2500, 30_000])
def test_processes_that_share_it_stay_within_the_bound(tmp_path: Path, max_bytes: int) -> None:
    """Each process looks after every write, while it holds the lock, so that nothing moves."""
    code = """
import fcntl
max_bytes, first = int(sys.argv[2]), int(sys.argv[3])
cache = BlockCache(sys.argv[1], max_bytes=max_bytes)
for number in range(first, first + 100):
    cache.put(f"{number}", bytes([number % 256]) * 1000)
    with open(os.path.join(sys.argv[1], "usage")) as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        folders = [entry for entry in os.scandir(sys.argv[1]) if entry.is_dir()]
        used = sum(file.stat().st_size for folder in folders for file in os.scandir(folder))
        assert used <= int(lock.read()) <= max_bytes, used
"""
    starts = (0, 50, 100)
    with ExitStack() as stack:
        processes = [
            stack.enter_context(python(code, str(tmp_path), str(max_bytes), str(start)))
            for start in starts
        ]
        for process in processes:
            _, errors = process.communicate(timeout=50)
            assert process.returncode == 0, errors
    cache = BlockCache(str(tmp_path), max_bytes=max_bytes)
    assert len(held(cache, range(200))) >= max_bytes // 1500
    assert not list(tmp_path.glob("??/*.partial"))


def test_what_a_killed_writer_left_is_deleted(tmp_path: Path) -> None:
    """The kernel kills a process that exceeds its largest file size, in the middle of a write."""
    code = """
resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500))
signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
BlockCache(sys.argv[1], max_bytes=10_000).put("name", bytes(1000))
"""
    with python(code, str(tmp_path)) as process:
        process.communicate(timeout=20)
    assert process.returncode == -signal.SIGXFSZ
    assert len(list(tmp_path.glob("??/*.partial"))) == 1
    cache = BlockCache(str(tmp_path), max_bytes=10_000)
    assert not list(tmp_path.glob("??/*.partial"))
    cache.put("name", payload(1))
    assert content(cache, "name") == payload(1)


def test_a_full_disk_ends_caching_with_one_warning(tmp_path: Path) -> None:
    """A largest file size is refused to a process as a full disk is: in the middle of a write."""
    code = """
import logging
logging.basicConfig(format="%(message)s")
cache = BlockCache(sys.argv[1], max_bytes=100_000)
cache.put("before", bytes(400))
resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500))
for number in range(3):
    cache.put(f"{number}", bytes(1000))
assert cache.get("before") == bytes(400)
assert cache.get("0") is None
"""
    with python(code, str(tmp_path)) as process:
        _, errors = process.communicate(timeout=20)
    assert process.returncode == 0, errors
    assert errors.count("\n") == 1
    assert f"cache keeps nothing more directory={tmp_path} reason=[Errno 27]" in errors
    assert len(list(tmp_path.glob("??/*"))) == 1


def test_a_directory_that_cannot_be_is_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_bytes(b"")
    with caplog.at_level(logging.WARNING):
        cache = BlockCache(str(tmp_path / "file" / "below"), max_bytes=1000)
    assert "cache keeps nothing more" in caplog.text
    cache.put("name", b"content")
    assert content(cache, "name") is None


def test_a_process_that_stopped_with_the_lock_does_not_stop_the_others(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = BlockCache(str(tmp_path), max_bytes=10_000, lock_wait_s=0.05)
    cache.put("before", b"content")
    code = """
import fcntl
fcntl.flock(os.open(sys.argv[1], os.O_RDWR), fcntl.LOCK_EX)
print("locked", file=sys.stderr, flush=True)
sys.stdin.read()
"""
    with python(code, str(tmp_path / "usage")) as process:
        assert process.stderr is not None
        assert process.stderr.readline() == "locked\n"
        cache.put("name", b"content")
        process.communicate(timeout=20)
    assert "reason=another process holds it for 0.05 s" in caplog.text
    assert content(cache, "before") == b"content"
