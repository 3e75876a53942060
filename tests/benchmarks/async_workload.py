"""The workload of bench-async's pushes, the same for all: the whole Xception, and gradients that
are there before the clock starts.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from xdist.model_config import ModelConfig
from xdist.models import build_model

NUM_CLASSES = 1000
LEARNING_RATE, MOMENTUM, DECAY, EPSILON, L2 = 0.045, 0.9, 0.9, 1.0, 1e-5
AVERAGE_DECAY = 0.999


def make_network(width: float) -> nn.Module:
    """22.9 million weights where `width` is 1, in one thread; every process draws the same."""
    torch.set_num_threads(1)
    return build_model(ModelConfig(width=width), num_classes=NUM_CLASSES, head_bias=0.0, seed=0)


def fixed_gradient(like: Tensor, *, worker: int) -> Tensor:
    """What this worker pushes every time, for this vector or parameter."""
    generator = torch.Generator().manual_seed(worker)
    return torch.randn(like.shape, generator=generator) * 1e-3
