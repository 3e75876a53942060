"""What all tests share: one thread for torch, and the one Ray of the whole test run."""

from __future__ import annotations

import os
import secrets

# Before torch and ray are imported, which read these once. Two cores are shared by everything.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # Loopback alone.
os.environ["RAY_AUTH_MODE"] = "token"
os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)

from tests.clusters import cluster, second_node
from tests.real_images import shared_data

__all__ = ["cluster", "second_node", "shared_data"]
