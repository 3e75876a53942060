"""What all tests share: one thread for torch, and the one Ray of the whole test run; `--part 1/2`,
for a run beside another one.
"""

from __future__ import annotations

import os
import re
import secrets

import pytest

# Before torch and ray are imported, which read these once. Two cores are shared by everything.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # Loopback alone.
os.environ["RAY_AUTH_MODE"] = "token"
os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)

from tests.clusters import cluster, second_node
from tests.real_images import shared_data

__all__ = ["cluster", "second_node", "shared_data"]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--part", default="1/1", help="1/2: every second one of the tests")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave tests to the other parts: neighbours, which are alike, to different ones."""
    part = re.fullmatch(r"([1-9])/([1-9])", config.getoption("--part"))
    if part is None or int(part[1]) > int(part[2]):
        raise pytest.UsageError(f"--part is {config.getoption('--part')}; allowed: 1/2, 2/2 ...")
    chosen = items[int(part[1]) - 1 :: int(part[2])]
    left = set(items) - set(chosen)
    config.hook.pytest_deselected(items=[item for item in items if item in left])
    items[:] = chosen
