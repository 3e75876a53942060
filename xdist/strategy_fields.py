"""Which fields of a configuration only one strategy reads: under the other one they are ignored, so
that `strategy` alone changes a run over.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from xdist.config import TrainConfig
from xdist.servers_config import ServersConfig

logger = logging.getLogger(__name__)

ONLY_OF: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "all_reduce": {
        "": ("num_lanes", "bn_group", "on_resize", "compress_gradients"),
        "cluster": ("min_world_size", "num_spares", "collective_timeout_s"),
        "compute": ("fused_optimizer",),
    },
    "push_pull": {
        "": ("num_servers",),
        "cluster": ("cpus_per_server", "gpus_per_server"),
        "servers": tuple(option.name for option in fields(ServersConfig)),
    },
}
"""Strategy -> section ("": none) -> fields."""


def without_ignored(config: TrainConfig) -> TrainConfig:
    """The configuration with what its strategy does not read at the defaults; the log says what
    that was.
    """
    ignored: list[str] = []
    for strategy, sections in ONLY_OF.items():
        if strategy == config.strategy:
            continue
        for section, names in sections.items():
            part: Any = getattr(config, section) if section else config
            defaults = {option.name: option.default for option in fields(part)}
            changes = {
                name: defaults[name] for name in names if getattr(part, name) != defaults[name]
            }
            ignored += [f"{section}.{name}".lstrip(".") for name in changes]
            changed = replace(part, **changes)
            config = replace(config, **{section: changed}) if section else changed
    if ignored:
        logger.info("ignored with strategy %s: %s", config.strategy, ", ".join(ignored))
    return config
