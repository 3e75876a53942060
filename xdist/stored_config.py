"""The configuration that a checkpoint holds, as a value again."""

from __future__ import annotations

from xdist.checkpoint import Checkpoint
from xdist.config import TrainConfig
from xdist.errors import UnknownFormat
from xdist.plain_config import from_json


def stored_config(checkpoint: Checkpoint) -> TrainConfig:
    """The run's configuration when the checkpoint was written; a field that is missing, as it is
    newer, has its default.

    Raises `UnknownFormat` naming fields that this version does not know, or a value that it does
    not allow.
    """
    try:
        return from_json(TrainConfig, checkpoint.manifest.config)
    except ValueError as error:
        raise UnknownFormat(
            f"{checkpoint.url}: its configuration is not one of this version: {error}; use the "
            "version of this program that wrote it"
        ) from error
