"""A configuration comes back from JSON as it was."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from imagenet_sync import PRESETS as SYNC_PRESETS
from jft_async import PRESETS as ASYNC_PRESETS

from datapipe.position import Position
from xdist import checkpoint
from xdist.checkpoint import Checkpoint, Cut, Manifest
from xdist.config import TrainConfig
from xdist.errors import UnknownFormat
from xdist.evaluation_config import EvaluationConfig
from xdist.flat import Layout
from xdist.plain_config import from_json
from xdist.stored_config import stored_config

PRESETS = [*SYNC_PRESETS.values(), *ASYNC_PRESETS.values()]
CONFIG = replace(SYNC_PRESETS["cifar"], evaluation=EvaluationConfig(measures=("map", "top_k")))


def as_stored(config: TrainConfig) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(json.dumps(config.to_json()))
    return value


@pytest.mark.parametrize("config", [*PRESETS, CONFIG])
def test_every_preset_survives_json(config: TrainConfig) -> None:
    assert from_json(TrainConfig, as_stored(config)) == config


def test_a_field_that_is_missing_has_its_default() -> None:
    value = as_stored(CONFIG)
    del value["evaluation"], value["seed"], value["optimizer"]["l2_on"]
    assert from_json(TrainConfig, value) == replace(CONFIG, evaluation=EvaluationConfig())


def test_unknown_fields_are_named() -> None:
    value = as_stored(CONFIG)
    value["optimiser"], value["data"]["colour"] = {}, 3
    with pytest.raises(ValueError, match=r"unknown fields data\.colour, optimiser"):
        from_json(TrainConfig, value)


def test_a_needed_field_that_is_missing_is_named() -> None:
    value = as_stored(CONFIG)
    del value["loss"]
    with pytest.raises(ValueError, match="missing fields loss"):
        from_json(TrainConfig, value)


@pytest.mark.parametrize("change", [{"optimiser": {}}, {"batch_size": 0}])
def test_a_checkpoint_of_another_version_says_so(tmp_path: Path, change: dict[str, Any]) -> None:
    stored = checkpoint_with(str(tmp_path), {**as_stored(CONFIG), **change})
    with pytest.raises(UnknownFormat) as caught:
        stored_config(stored)
    assert next(iter(change)) in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_the_configuration_of_a_checkpoint(tmp_path: Path) -> None:
    assert stored_config(checkpoint_with(str(tmp_path), as_stored(CONFIG))) == CONFIG


def checkpoint_with(url: str, config: dict[str, Any]) -> Checkpoint:
    parts = (checkpoint.write_statistics(url, {"statistics": torch.zeros(1)}),)
    cut = Cut(0, 0, Position(), is_final=False)
    layout = Layout((), (), 0.1)
    return checkpoint.publish(url, Manifest(cut, layout, parts, {}, config, {}))
