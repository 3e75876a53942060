"""Computing so that the same work gives the same bits each time."""

from __future__ import annotations

import os

import torch

CUBLAS_WORKSPACES = "CUBLAS_WORKSPACE_CONFIG"
FIXED_WORKSPACES = ":4096:8"  # One of two values with which cuBLAS is deterministic (its manual).


def compute_deterministically() -> None:
    """From now on, in all of this process, every operation gives the same bits each time, or raises
    an error. To be called before the first computation on a GPU: cuBLAS looks at its environment
    once.
    """
    os.environ.setdefault(CUBLAS_WORKSPACES, FIXED_WORKSPACES)
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
