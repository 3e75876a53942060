"""native/board.c under ThreadSanitizer, which sees threads but not processes."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

NATIVE = Path(__file__).resolve().parents[2] / "native"


@pytest.mark.slow
def test_thread_sanitizer_finds_no_race_on_a_board(tmp_path: Path) -> None:
    gcc = shutil.which("gcc")
    if gcc is None:
        pytest.skip("needs gcc: apt-get install gcc")
    program = tmp_path / "board_race"
    sources = [NATIVE / "board.c", NATIVE / "fuzz" / "board_race.c"]
    # It does not follow fences, and says so; what they order here, it is not shown.
    options = ["-std=gnu11", "-O2", "-g", "-fsanitize=thread", "-Wno-tsan"]
    built = subprocess.run(
        [gcc, *options, *sources, "-o", program], check=False, capture_output=True, text=True
    )
    if "tsan" in built.stderr:
        pytest.skip("this gcc comes without ThreadSanitizer")
    assert built.returncode == 0, built.stderr
    ran = subprocess.run([program, "4"], check=False, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
