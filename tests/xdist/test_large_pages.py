"""Vectors on large pages are vectors."""

from __future__ import annotations

import gc
import mmap
import re
from pathlib import Path

import pytest
import torch

from xdist import large_pages

AT_LEAST = large_pages.SMALLEST_BYTES


@pytest.mark.parametrize("num_bytes", [0, 400, AT_LEAST, 8 * AT_LEAST + 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_copy_has_the_same_values_shape_and_type(num_bytes: int, dtype: torch.dtype) -> None:
    values = torch.randn(num_bytes // dtype.itemsize).to(dtype)
    copy = large_pages.copy(values)
    assert copy.dtype == dtype
    assert torch.equal(copy, values)
    if num_bytes:
        copy[-1] = 7
        assert values[-1] != 7


def test_a_matrix_keeps_its_shape() -> None:
    values = torch.randn(1024, 4096)
    assert torch.equal(large_pages.copy(values), values)


def test_memory_ends_with_the_last_view() -> None:
    before = resident_bytes()
    view = large_pages.empty_like(torch.empty(64 << 20)).zero_()[-1:]
    gc.collect()
    assert view == 0
    assert resident_bytes() - before > 200 << 20
    del view
    gc.collect()
    assert resident_bytes() - before < 50 << 20


def test_large_pages_are_what_is_had() -> None:
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if (
        not hasattr(mmap, "MADV_HUGEPAGE")
        or not setting.exists()
        or "[never]" in setting.read_text()
    ):
        pytest.skip(f"this system gives none: see {setting}")
    before = large_bytes()
    values = large_pages.empty_like(torch.empty(16 << 20)).zero_()
    assert large_bytes() - before > values.nbytes // 2


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


def large_bytes() -> int:
    found = re.search(r"AnonHugePages: +(\d+) kB", Path("/proc/self/smaps_rollup").read_text())
    assert found is not None
    return int(found[1]) << 10
