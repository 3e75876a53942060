"""doctor: which decoder is active, and what to do where it is the slow one."""

from __future__ import annotations

from pathlib import Path

import pytest

from datapipe.__main__ import main
from datapipe.decode import active_kernel
from datapipe.doctor import APT_LINE, remedy


def test_the_active_kernel_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    kernel = active_kernel()
    first = capsys.readouterr().out.splitlines()[0]
    assert first.split(maxsplit=2)[2] == f"{kernel.name}: {kernel.detail}"


def test_a_missing_compiler_is_named() -> None:
    for command in ([], ["no-such-compiler"]):
        reason, next_step = remedy(command)
        assert reason == "there is no C compiler"
        assert APT_LINE in next_step


def test_missing_headers_are_named(tmp_path: Path) -> None:
    compiler = tmp_path / "cc"
    compiler.write_text("#!/bin/sh\necho 'fatal error: jpeglib.h: No such file' >&2\nexit 1\n")
    compiler.chmod(0o700)
    reason, next_step = remedy([str(compiler)])
    assert reason == f"{compiler} does not find libjpeg-turbo: fatal error: jpeglib.h: No such file"
    assert APT_LINE in next_step


def test_where_all_is_there_only_the_installation_is_missing(tmp_path: Path) -> None:
    compiler = tmp_path / "cc"
    compiler.write_text("#!/bin/sh\nexit 0\n")
    compiler.chmod(0o700)
    assert remedy([str(compiler)])[1].startswith("next, where the sources are: pip install")
