"""Preparation: all that is settled before the first actor starts, so that what is wrong is said at
once.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from datapipe.index import ShardIndex, ensure_index
from datapipe.position import Position
from datapipe.storage import absolute
from xdist import checkpoint, sizing
from xdist.checkpoint import Checkpoint, Cut, Manifest
from xdist.config import PROFILED_STEPS, ClusterConfig, TrainConfig
from xdist.errors import RunDirectoryError, UserError
from xdist.flat import FlatModel
from xdist.label_space import labels_at
from xdist.run_directory import RunDirectory
from xdist.scoring import ScoringPlan, plan_scoring
from xdist.state import STATISTICS, WEIGHTS
from xdist.topologies import RunPlan
from xdist.training_data import Sources, TrainingData, check_same_labels
from xdist.worker import initial_model

logger = logging.getLogger(__name__)

TRIED_IMAGE_SIZE = 299
"""What larger images come to is larger too. (A forward pass on torch's device "meta" takes longer
than one of this size: two seconds of imports.)
"""
DATA_NAMES = {
    "fingerprint": "training set",
    "order": "order of samples (seed, data.block_size, data.blocks_per_pool, data.mix_weights)",
}


@dataclass(frozen=True)
class Preparation:
    """What a driver needs to begin."""

    config: TrainConfig
    """As it was asked for, sized."""
    plan: RunPlan
    scoring: ScoringPlan | None


def prepare(
    config: TrainConfig, run: RunDirectory, resources: Sequence[Mapping[str, float]]
) -> Preparation:
    """Size the run for nodes with these resources, find and check the data.

    Nothing is written but the index of shards that have none: what is wrong can be mended, and the
    same run directory used. Raises `NotEnoughResources`, `DataError`, `UserError`.
    """
    asked_for = config.cluster
    fewest = sizing.fewest_to_begin(config, resumes=run.was_begun)
    config = sizing.sized(config, resources, resumes=run.was_begun)
    _warn_of_no_gpus(asked_for, config.cluster)
    sources = Sources(config, run_dir=run.url)
    data = sources.check()
    num_classes = config.model.num_classes or data.num_labels
    _check_labels(data.num_labels, config.data.train, num_classes)
    if num_classes > data.num_labels:
        logger.warning(
            "the network has more outputs than the training set has labels outputs=%d labels=%d; "
            "--model.num-classes None makes them equal",
            num_classes,
            data.num_labels,
        )
    _check_shapes(config, num_classes)
    num_samples = data.order.num_samples
    num_steps = config.num_steps(num_samples)
    if config.profile and num_steps < PROFILED_STEPS:
        raise UserError(
            f"profile is True; allowed: False in a run of {num_steps} steps: a trace is "
            f"complete after {PROFILED_STEPS}"
        )
    plan = RunPlan(
        config=config.resolved(num_samples),
        run_dir=run.url,
        data=data,
        num_classes=num_classes,
        num_places=config.num_places(num_samples),
        save_every_samples=config.checkpoint.every_samples or num_samples,
        fewest_to_begin=fewest,
    )
    logger.info(
        "run prepared strategy=%s workers=%s servers=%s samples=%d classes=%d",
        config.strategy,
        config.num_workers,
        config.num_servers if config.strategy == "push_pull" else 0,
        num_samples,
        num_classes,
    )
    return Preparation(config, plan, _scoring(config, run, num_classes, data, sources))


def _warn_of_no_gpus(asked_for: ClusterConfig, sized: ClusterConfig) -> None:
    is_decided = asked_for.gpus_per_worker == "auto" and sized.gpus_per_worker == 0
    if is_decided and sized.max_world_size is not None:
        logger.warning(
            "the cluster has no GPU now, so no worker gets one in this run, also when it grows; "
            "--cluster.gpus-per-worker 1 waits for them, --cluster.wait-s says how long"
        )


def _check_labels(num_labels: int, url: str, num_classes: int) -> None:
    if num_labels > num_classes:
        raise UserError(
            f"{url}: there are labels up to {num_labels - 1}, the model has {num_classes} outputs; "
            f"set model.num_classes to at least {num_labels}"
        )
    if num_labels == 0:
        raise UserError(f"{url}: no image has a label; pack it with labels (jobs/pack_shards.py)")


def _check_shapes(config: TrainConfig, num_classes: int) -> None:
    """The fewest images that batch norm sees must go through the network."""
    size, least = config.data.image_size, config.model.least_image_size
    if size < least:
        can_be_small = config.model.name == "inception_v3" and not config.model.small_input
        raise UserError(
            f"data.image_size is {size}; allowed: at least {least} with {config.model.name}"
            + (", or 31 with model.small_input" if can_be_small else "")
        )
    smallest = _smallest_part(config)
    if smallest > 1:
        return  # Batch norm needs two values, and has them.
    model = initial_model(config, num_classes=num_classes).train()
    tried = min(size, TRIED_IMAGE_SIZE)
    try:
        with torch.no_grad():
            model(torch.zeros(smallest, 3, tried, tried))
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f"{smallest} images of {size} px, the fewest that are computed together, do not go "
            f"through the network ({error}); raise batch_size or data.image_size"
        ) from error


def _smallest_part(config: TrainConfig) -> int:
    """The fewest images that batch norm ever sees together. Raises `UserError` where a batch has
    not as many images as it is to have parts.
    """
    num_images, num_parts = config.batch_size, config.compute.accumulation_steps
    if config.strategy == "all_reduce":
        most = sizing.most_workers(config)
        lanes = sizing.num_lanes(config, num_workers=most)
        of_one = 1 if config.bn_group == "lane" else lanes // most
        num_images = of_one * (config.batch_size // lanes)
    if num_parts > num_images:
        raise UserError(
            f"compute.accumulation_steps is {num_parts}; allowed: at most {num_images}, the images "
            "of a worker's step; lower it, or raise batch_size"
        )
    return num_images // num_parts


def _scoring(
    config: TrainConfig,
    run: RunDirectory,
    num_classes: int,
    data: TrainingData,
    sources: Sources,
) -> ScoringPlan | None:
    if config.data.evaluation is None:
        return None
    index_url = ensure_index(config.data.evaluation, index_directory=f"{run.url}/index/evaluation")
    index = ShardIndex.open(index_url)
    index.check_shards()
    _check_labels(index.num_labels, config.data.evaluation, num_classes)
    evaluation_labels = labels_at(config.data.evaluation)
    check_same_labels(data.labels, config.data.train, config.data.evaluation, evaluation_labels)
    return plan_scoring(
        config,
        index_url=index_url,
        num_classes=num_classes,
        labels=data.labels,
        frequencies=sources.label_frequencies(),
    )


def starting_checkpoint(plan: RunPlan, resume_from: str | None = None) -> Checkpoint:
    """The run's last checkpoint; or a copy of the one that it is to begin with, as
    `checkpoint.find` takes it; or a new one of step 0 with the initial weights.

    Raises `RunDirectoryError` when the checkpoint is of other data, in another order, or of another
    network.
    """
    flat = FlatModel(initial_model(plan.config, num_classes=plan.num_classes))
    logger.info("network built parameters=%d", flat.layout.num_weights)
    data = {"fingerprint": plan.data.fingerprint, "order": plan.order.facts()}
    found = checkpoint.latest(plan.run_dir)
    is_own = found is not None
    if found is not None and resume_from is not None:
        logger.info("the run has begun, and goes on from its own checkpoint, not %s", resume_from)
    elif resume_from is not None:
        found, _ = checkpoint.find(absolute(resume_from))
    if found is not None:
        _check_same("network", found.url, found.manifest.layout, flat.layout)
        for name, value in data.items():
            _check_same(DATA_NAMES[name], found.url, found.manifest.data.get(name), value)
        cut = found.manifest.cut
        logger.info("run resumed step=%d samples=%d", cut.step, cut.num_samples)
        config = plan.config.to_json()
        return found if is_own else checkpoint.copy(found, plan.run_dir, config=config)
    checkpoint.make_directory(plan.run_dir)
    url = checkpoint.checkpoint_url(plan.run_dir, 0)
    size = flat.layout.num_weights
    parts = (
        checkpoint.write_range(url, {WEIGHTS: flat.weights}, start=0, stop=size),
        checkpoint.write_statistics(url, {STATISTICS: flat.statistics}),
    )
    cut = Cut(0, 0, Position(), is_final=False)
    config = plan.config.to_json()
    return checkpoint.publish(
        url, Manifest(cut, flat.layout, parts, data, config, checkpoint.versions())
    )


def _check_same(what: str, url: str, found: object, wanted: object) -> None:
    if found != wanted:
        raise RunDirectoryError(
            f"{url} was trained with another {what} than this configuration gives; "
            "choose another --run-dir"
        )
