"""The presets hold the paper's values, field by field."""

from __future__ import annotations

from functools import reduce
from typing import Any

import pytest
from imagenet_sync import PRESETS as SYNC_PRESETS
from jft_async import PRESETS as ASYNC_PRESETS

from xdist.config import TrainConfig

NUM_IMAGENET, NUM_JFT = 1_281_167, 350_000_000

IMAGENET = {  # field: (value, section or table)
    "data.image_size": (299, "figure 5"),
    "model.name": ("xception", "figure 5"),
    "model.num_classes": (1000, "4, ImageNet"),
    "model.width": (1.0, "figure 5"),
    "model.middle_modules": (8, "figure 5"),
    "model.residual": (True, "figure 5, 4.6"),
    "model.mid_activation": ("none", "4.7, figure 10"),
    "model.segments": (None, "3"),
    "model.fc": ((), "4.5.1: FC layers on JFT alone"),
    "model.dropout": (0.5, "4.3"),
    "loss": ("softmax", "4: one class an image"),
    "strategy": ("all_reduce", "4.4: synchronous"),
    "num_workers": (60, "4.4: 60 K80"),
    "optimizer.name": ("sgd", "4.2"),
    "optimizer.momentum": (0.9, "4.2"),
    "optimizer.learning_rate": (0.045, "4.2"),
    "optimizer.decay_factor": (0.94, "4.2"),
    "optimizer.decay_every": (2 * NUM_IMAGENET, "4.2: 2 epochs"),
    "optimizer.l2": (1e-5, "4.3"),
    "label_smoothing": (0.0, "not mentioned"),
}
JFT = {
    "data.image_size": (299, "figure 5"),
    "model.name": ("xception", "figure 5"),
    "model.num_classes": (17_000, "4.1"),
    "model.width": (1.0, "figure 5"),
    "model.middle_modules": (8, "figure 5"),
    "model.residual": (True, "figure 5, 4.6"),
    "model.mid_activation": ("none", "4.7, figure 10"),
    "model.segments": (None, "3"),
    "model.fc": ((4096, 4096), "4.5.1, table 2"),
    "model.dropout": (0.0, "4.3: none, as the set is so large"),
    "loss": ("sigmoid", "4.1: multi-label"),
    "strategy": ("push_pull", "4.4: asynchronous"),
    "num_workers": (60, "4.4: 60 K80"),
    "optimizer.name": ("rmsprop", "4.2"),
    "optimizer.momentum": (0.9, "4.2"),
    "optimizer.learning_rate": (0.001, "4.2"),
    "optimizer.decay_factor": (0.9, "4.2"),
    "optimizer.decay_every": (3_000_000, "4.2: samples"),
    "optimizer.l2": (1e-5, "4.3"),
    "max_steps": (30_000_000, "table 2"),
}


def value_of(config: TrainConfig, field: str) -> Any:
    return reduce(getattr, field.split("."), config)


@pytest.mark.parametrize("field", IMAGENET)
def test_the_imagenet_preset_is_the_papers(field: str) -> None:
    config = SYNC_PRESETS["paper"].resolved(NUM_IMAGENET)
    assert value_of(config, field) == IMAGENET[field][0]


@pytest.mark.parametrize("field", JFT)
def test_the_jft_preset_is_the_papers(field: str) -> None:
    config = ASYNC_PRESETS["paper"].resolved(NUM_JFT)
    assert value_of(config, field) == JFT[field][0]


@pytest.mark.parametrize("presets", [SYNC_PRESETS, ASYNC_PRESETS])
def test_both_recipes_average_the_weights(presets: dict[str, TrainConfig]) -> None:
    """Section 4.2: evaluation is on Polyak averages; their decay is not given."""
    assert presets["paper"].optimizer.average_decay == 0.9999


def test_the_jft_preset_that_learns_decays_every_so_many_steps_of_32() -> None:
    literal, steps = (
        ASYNC_PRESETS["paper"].resolved(NUM_JFT),
        ASYNC_PRESETS["jft"].resolved(NUM_JFT),
    )
    assert steps.optimizer.decay_every == 96_000_000
    assert steps.model == literal.model
