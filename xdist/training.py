"""Training: one run, on the cluster that this process is connected to."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import replace

from rich.console import Console

from xdist.config import TrainConfig
from xdist.driver import TOPOLOGIES, Driver, MakeTopology, Summary
from xdist.interruption import Interruption
from xdist.preparation import prepare, starting_checkpoint
from xdist.run_directory import CONFIG, RunDirectory
from xdist.strategy_fields import without_ignored
from xdist.topologies import nodes

logger = logging.getLogger(__name__)


def train(
    config: TrainConfig,
    run: RunDirectory,
    *,
    console: Console,
    topologies: Mapping[str, MakeTopology] = TOPOLOGIES,
    on_other_nodes: Callable[[], object] = lambda: None,
    interruption: Interruption | None = None,
) -> Summary:
    """Run to the end on the cluster that this process is connected to (`connection.connect`).

    `on_other_nodes` is called once on each of them before anything else. Raises
    `KeyboardInterrupt` when it has ended as `interruption` asked.
    """
    nodes.on_others(on_other_nodes)
    interruption = interruption or Interruption()
    try:
        return _train(
            config, run, console=console, topologies=topologies, interruption=interruption
        )
    finally:
        if config.cluster.max_world_size is not None:
            nodes.withdraw_request()


def _train(
    config: TrainConfig,
    run: RunDirectory,
    *,
    console: Console,
    topologies: Mapping[str, MakeTopology],
    interruption: Interruption,
) -> Summary:
    config = without_ignored(config)
    preparation = prepare(config, run, nodes.resources_for(config, resumes=run.was_begun))
    plan = nodes.placed(preparation.plan)
    run.store(CONFIG, preparation.config.to_json())
    logger.info("configuration %s", json.dumps(plan.config.to_json()))
    start = starting_checkpoint(plan)
    topology = topologies[config.strategy](plan)
    preparation = replace(preparation, plan=plan)
    driver = Driver(
        preparation, run, topology, start=start, console=console, interruption=interruption
    )
    return driver.drive()
