"""The training state of bench-checkpoint: the full Xception under RMSProp."""

from __future__ import annotations

import torch

from xdist.config import OptimizerConfig
from xdist.flat import FlatModel
from xdist.model_config import ModelConfig
from xdist.models import build_model
from xdist.state import RangeState
from xdist.update import Step

NUM_CLASSES = 1000


def make_model() -> FlatModel:
    """Every process draws the same weights."""
    return FlatModel(build_model(ModelConfig(), num_classes=NUM_CLASSES, head_bias=0.0, seed=0))


def make_state(flat: FlatModel) -> RangeState:
    """Weights, mean squares and momentum of the whole model."""
    return RangeState.from_tensors(
        {"weights": flat.weights},
        config=OptimizerConfig(name="rmsprop", l2=1e-5),
        start=0,
        stop=flat.layout.num_weights,
        l2_mask=flat.layout.l2_mask("kernels"),
    )


def update(state: RangeState) -> None:
    """Touch all of it, as training does."""
    gradients = torch.full_like(state.weights, 1e-3)
    state.apply(Step(gradients, learning_rate=1e-3))
