"""The built-in data set as a job's default: synthetic scenes, made where they are absent."""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import partial
from pathlib import Path

from datapipe.scenes.making import SceneDirectories, ScenesConfig, ensure_scenes
from xdist.config import TrainConfig
from xdist.errors import UserError

logger = logging.getLogger(__name__)

SCENES = "scenes"
"""The name that stands for the built-in data set in `data.train` and `data.evaluation`."""
DIRECTORY = Path("~/.cache/xdist")


class MakeScenes:
    """A function that makes the scenes of this machine if they are absent. Raises `UserError`.

    Where it is sent to, it makes them at the path that they have here: nodes may have other homes.
    """

    def __call__(self) -> SceneDirectories:
        try:
            return ensure_scenes(DIRECTORY, ScenesConfig())
        except (OSError, RuntimeError) as error:  # The latter where there is no home.
            raise UserError(
                f"the synthetic scenes cannot be written below {DIRECTORY}: {error}; set HOME to a "
                "directory that can be written and has room"
            ) from error

    def __reduce__(self) -> tuple[type, tuple[object, ...]]:
        return partial, (ensure_scenes, DIRECTORY.expanduser(), ScenesConfig())


make_scenes = MakeScenes()


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
    made = make_scenes()
    evaluation = str(made.evaluation) if data.evaluation == SCENES else data.evaluation
    return replace(config, data=replace(data, train=str(made.train), evaluation=evaluation))
