"""The built-in data set as a job's default: synthetic scenes, made where they are absent."""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import partial
from pathlib import Path

from datapipe.scenes.making import ScenesConfig, ensure_scenes
from xdist.config import TrainConfig
from xdist.errors import UserError

logger = logging.getLogger(__name__)

SCENES = "scenes"
"""The name that stands for the built-in data set in `data.train` and `data.evaluation`."""
make_scenes = partial(ensure_scenes, Path("~/.cache/xdist").expanduser(), ScenesConfig())
"""Make the scenes of this machine, at the path that they have on all, if they are absent."""


def with_scenes(config: TrainConfig) -> TrainConfig:
    """`config` with the directories of the scenes in the place of their name."""
    data = config.data
    if SCENES not in (data.train, data.evaluation):
        return config
    if data.train != SCENES:
        raise UserError(
            f"data.train is {data.train}, data.evaluation the built-in scenes, with other labels; "
            "set data.evaluation to held-out shards of your own, or to None"
        )
    logger.info(
        "training on built-in synthetic scenes; for your own images, pack them with "
        "jobs/pack_shards.py, then give --data.train DIRECTORY --data.evaluation DIRECTORY"
    )
    try:
        made = make_scenes()
    except OSError as error:
        raise UserError(f"the synthetic scenes cannot be written: {error}") from error
    evaluation = str(made.evaluation) if data.evaluation == SCENES else data.evaluation
    return replace(config, data=replace(data, train=str(made.train), evaluation=evaluation))
