"""The presets hold the paper's values, field by field."""

from __future__ import annotations

from dataclasses import replace
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


AUGMENTATION = "augmentation, which the paper does not mention: that of GoogLeNet"
INPUT = "how shards are read"
LIFE = "saving, scoring, resources and the run's place"
COMPUTE = "how a gradient is computed, not which"
OTHER = "an option of another network, or at its neutral value"
NOT_OF_THE_PAPER = {  # field: (values of ImageNet and JFT, why)
    "data.train": (("imagenet/train", "jft/train"), "the user's copy"),
    "data.mix": (((), ()), "one training set"),
    "data.mix_weights": (((), ()), "one training set"),
    "data.evaluation": (("imagenet/validation", "jft/fasteval14k"), "the user's copy"),
    "data.crop_area": (((0.08, 1.0),) * 2, AUGMENTATION),
    "data.crop_aspect": (((3 / 4, 4 / 3),) * 2, AUGMENTATION),
    "data.flip": ((True, True), AUGMENTATION),
    "data.evaluation_crop": ((0.875, 0.875), "single crop; Inception's usual share"),
    "optimizer.rmsprop_decay": ((0.9, 0.9), "Google's Inception recipes"),
    "optimizer.rmsprop_epsilon": ((1.0, 1.0), "Google's Inception recipes"),
    "optimizer.warmup_samples": ((0, 0), "no warm-up is mentioned"),
    "optimizer.l2_on": (("kernels", "kernels"), "Google's Inception recipes"),
    "optimizer.average_decay": ((0.9999, 0.9999), "4.2 says Polyak averaging, not its decay"),
    "batch_size": ((1920, 32), "32 a worker, Google's usual"),
    "num_epochs": ((181, 3), "three days; 30 million steps"),
    **{f"data.{name}": (None, INPUT) for name in (
        "block_size", "blocks_per_pool", "decode_threads", "prefetch_batches", "max_bad_samples",
        "read_threads", "read_ahead_mb", "read_retries", "read_timeout_s", "cache_dir", "cache_gb",
    )},
    **dict.fromkeys((
        "checkpoint.every_samples", "checkpoint.keep", "checkpoint.keep_best",
        "checkpoint.keep_every", "checkpoint.evaluate_every", "checkpoint.max_age_s",
        "evaluation.measures", "evaluation.class_weights", "evaluation.skip",
        "evaluation.batch_size", "evaluation.num_cpus", "evaluation.num_gpus",
        "cluster.cpus_per_worker", "cluster.gpus_per_worker",
        "cluster.cpus_per_server", "cluster.gpus_per_server", "cluster.wait_s",
        "cluster.max_recoveries", "num_servers",
        "num_lanes", "report_every_steps", "seed", "run_dir", "cluster.placement",
        "cluster.min_world_size", "cluster.max_world_size", "cluster.num_spares",
        "cluster.fork_actors",
        "cluster.collective_timeout_s", "cluster.recovery_window_s", "deterministic", "profile",
        "trackers",
    ), (None, LIFE)),
    **{f"compute.{name}": (None, COMPUTE) for name in (
        "precision", "accumulation_steps", "channels_last", "compile", "cuda_graphs",
        "fused_optimizer",
    )},
    "bn_group": (("rank", "rank"), "a worker's batch, as without any synchronisation"),
    "on_resize": (("keep_global_batch",) * 2, "60 workers, always"),
    "compress_gradients": (("none", "none"), "not mentioned"),
    "optimizer.clip_norm": ((None, None), "not mentioned"),
    **dict.fromkeys(("servers.replicas", "servers.lease_timeout_s"), (None, LIFE)),
    "servers.shared_memory": ((True, True), "not mentioned"),
    "servers.wire": (("float32", "float32"), "not mentioned"),
    "servers.error_feedback": ((False, False), "not mentioned"),
    "servers.factors": ((False, False), "not mentioned"),
    "checkpoint.final_save_s": (None, LIFE),
    "servers.link_gbits": ((10.0, 10.0), "not mentioned"),
    "servers.overlap": ((0, 0), "not mentioned"),
    "servers.max_clock_lead": ((None, None), "not mentioned"),
    "servers.scale_by_staleness": ((False, False), "not mentioned"),
    "servers.commit_first": ((None, None), "JFT is asynchronous"),
    "servers.start_over_steps": ((0, 0), "not mentioned"),
    **dict.fromkeys((
        "model.layout", "model.small_input", "model.pooled_size", "model.conv_bias",
        "optimizer.decay_unit", "optimizer.average_half_life_samples",
    ), (None, OTHER)),
    "label_smoothing": ((0.0, 0.0), "not mentioned"),
    "max_steps": ((None, 30_000_000), "table 2, of JFT alone"),
}  # fmt: skip


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


def leaves(value: dict[str, Any], prefix: str = "") -> set[str]:
    names = set()
    for name, item in value.items():
        is_part = isinstance(item, dict)
        names |= leaves(item, f"{prefix}{name}.") if is_part else {f"{prefix}{name}"}
    return names


@pytest.mark.parametrize("table", [IMAGENET, JFT], ids=["imagenet", "jft"])
def test_every_field_has_a_section_or_is_said_not_to_be_the_papers(table: dict[str, Any]) -> None:
    every_field = leaves(SYNC_PRESETS["paper"].to_json())
    assert every_field == table.keys() | NOT_OF_THE_PAPER.keys()


@pytest.mark.parametrize(
    "field", [name for name, (values, _) in NOT_OF_THE_PAPER.items() if values]
)
def test_what_the_paper_does_not_give_is_what_is_said_of_it(field: str) -> None:
    presets = (SYNC_PRESETS["paper"], ASYNC_PRESETS["paper"])
    assert tuple(value_of(preset, field) for preset in presets) == NOT_OF_THE_PAPER[field][0]


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
    same = replace(steps.optimizer, decay_every=literal.optimizer.decay_every)
    assert replace(steps, optimizer=same) == literal
