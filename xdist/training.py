"""Training: one run, on the cluster that this process is connected to."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from rich.console import Console

from datapipe.storage import absolute
from xdist import checkpoint
from xdist.config import TrainConfig
from xdist.driver import TOPOLOGIES, Driver, MakeTopology
from xdist.interruption import Interruption
from xdist.preparation import Preparation, prepare, starting_checkpoint
from xdist.rehearsal import Estimate, estimate, shortened
from xdist.run_directory import CONFIG, RunDirectory
from xdist.strategy_fields import without_ignored
from xdist.summary import Summary
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
    resume_from: str | None = None,
    adapt: Callable[[Preparation], Preparation] = lambda preparation: preparation,
) -> Summary:
    """Run to the end on the cluster that this process is connected to (`connection.connect`).

    `on_other_nodes` is called once on each of them before anything else. resume_from: what a run
    begins with that has no checkpoint yet, as `checkpoint.find` takes it. adapt: called with the
    run once it is sized and its data are found, returns what is to be run. Raises
    `KeyboardInterrupt` when it has ended as `interruption` asked.
    """
    nodes.on_others(on_other_nodes)
    interruption = interruption or Interruption()
    try:
        return _train(
            config,
            run,
            console=console,
            topologies=topologies,
            interruption=interruption,
            resume_from=resume_from,
            adapt=adapt,
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
    resume_from: str | None,
    adapt: Callable[[Preparation], Preparation],
) -> Summary:
    config = without_ignored(config)
    resources = nodes.resources_for(config, resumes=run.was_begun)
    preparation = adapt(prepare(config, run, resources))
    plan = nodes.placed(preparation.plan)
    run.take()
    run.store(CONFIG, preparation.config.to_json())
    logger.info("configuration %s", json.dumps(plan.config.to_json()))
    start = starting_checkpoint(plan, resume_from)
    topology = topologies[config.strategy](plan)
    preparation = replace(preparation, plan=plan)
    driver = Driver(
        preparation, run, topology, start=start, console=console, interruption=interruption
    )
    return driver.drive()


def rehearse(config: TrainConfig, run: RunDirectory, **how: Any) -> Estimate:
    """Make the first steps of a run in a directory that will be deleted; those from the initial
    weights, also where it would begin with a checkpoint. how: as `train` takes it. Raises as
    `train`, and `UserError` where the run has too few steps.
    """
    if (begins_with := how.pop("resume_from", None)) is not None:
        checkpoint.find(absolute(begins_with))
    train(config, run, **how, adapt=shortened)
    saved = checkpoint.latest(run.url)
    assert saved is not None
    return estimate(config, run.records(), saved)
