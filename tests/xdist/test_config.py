"""A configuration that cannot be is refused with field, value and choices."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest
from imagenet_sync import PRESETS as SYNC_PRESETS
from jft_async import PRESETS as ASYNC_PRESETS

from datapipe.config import DataConfig
from xdist.compute_config import ComputeConfig
from xdist.config import CheckpointConfig, ClusterConfig, OptimizerConfig, TrainConfig
from xdist.model_config import ModelConfig
from xdist.servers_config import ServersConfig

CONFIG = TrainConfig(
    data=DataConfig(train="somewhere"),
    strategy="all_reduce",
    loss="softmax",
    batch_size=8,
    num_epochs=1,
)


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        (ModelConfig, {"name": "alexnet"}, "model.name is 'alexnet'; allowed: one of xception"),
        (ModelConfig, {"width": float("nan")}, "model.width is nan; allowed: above 0, at most 8"),
        (ModelConfig, {"fc": (0,)}, "model.fc"),
        (ModelConfig, {"dropout": 1.0}, "model.dropout is 1.0; allowed: at least 0, below 1"),
        (ModelConfig, {"num_classes": 0}, "model.num_classes is 0; allowed: at least 1"),
        (OptimizerConfig, {"learning_rate": 0.0}, "learning_rate is 0.0; allowed: above 0"),
        (OptimizerConfig, {"learning_rate": float("inf")}, "learning_rate is inf"),
        (OptimizerConfig, {"momentum": -0.1}, "optimizer.momentum is -0.1"),
        (OptimizerConfig, {"l2": float("nan")}, "optimizer.l2 is nan; allowed: at least 0"),
        (OptimizerConfig, {"decay_factor": 1.1}, "decay_factor is 1.1; allowed: above 0, at most"),
        (OptimizerConfig, {"decay_every": 0}, "decay_every is 0; allowed: above 0"),
        (ClusterConfig, {"wait_s": math.inf}, "wait_s is inf; allowed: at least 0, and finite"),
        (
            OptimizerConfig,
            {"average_decay": 0.9, "average_half_life_samples": 5},
            "both set; set one of them to None",
        ),
        (CheckpointConfig, {"keep": 0}, "checkpoint.keep is 0; allowed: at least 1"),
        (ClusterConfig, {"cpus_per_worker": 1e-9}, "cluster.cpus_per_worker is 1e-09"),
        (ClusterConfig, {"wait_s": 1e300}, r"cluster.wait_s is 1e\+300; .* a week"),
        (ClusterConfig, {"gpus_per_worker": -1}, "cluster.gpus_per_worker is -1"),
        (ComputeConfig, {"accumulation_steps": 0}, "accumulation_steps is 0; allowed: at least 1"),
        (ServersConfig, {"overlap": -1}, "servers.overlap is -1; allowed: at least 0"),
        (
            ServersConfig,
            {"error_feedback": True},
            "servers.error_feedback is True; allowed: False with servers.wire float32",
        ),
        (
            ServersConfig,
            {"error_feedback": True, "wire": "bfloat16", "factors": True},
            "servers.factors is True; allowed: False with servers.error_feedback",
        ),
        (
            ServersConfig,
            {"error_feedback": True, "wire": "bfloat16", "commit_first": 2},
            "servers.error_feedback is True; allowed: False with servers.commit_first",
        ),
        (ServersConfig, {"max_clock_lead": 0}, "servers.max_clock_lead is 0; allowed: at least 1"),
        (
            ServersConfig,
            {"commit_first": 2, "overlap": 1},
            "servers.overlap is 1; allowed: 0 with servers.commit_first",
        ),
        (
            ComputeConfig,
            {"cuda_graphs": True, "compile": True},
            "compute.cuda_graphs is True; allowed: False with compute.compile",
        ),
    ],
)
def test_a_part_says_what_is_wrong(kind: type, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        kind(**values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_workers": 0}, "num_workers is 0; allowed: at least 1"),
        ({"batch_size": 0}, "batch_size is 0; allowed: at least 1"),
        ({"num_epochs": -1}, "num_epochs is -1"),
        ({"num_lanes": 3}, "num_lanes is 3; allowed: a divisor of batch_size, which is 8"),
        ({"num_workers": 9}, "batch_size is 8; allowed: at least num_workers, which is 9"),
        ({"label_smoothing": 1.0}, "label_smoothing is 1.0; allowed: at least 0, below 1"),
        ({"loss": "sigmoid", "label_smoothing": 0.1}, "label_smoothing is 0.1; allowed: 0 with"),
        (
            {"bn_group": "lane", "compute": ComputeConfig(accumulation_steps=2)},
            "compute.accumulation_steps is 2; allowed: 1 with bn_group lane",
        ),
        (
            {
                "cluster": ClusterConfig(gpus_per_worker=0),
                "compute": ComputeConfig(cuda_graphs=True),
            },
            "compute.cuda_graphs is True; allowed: False with cluster.gpus_per_worker 0",
        ),
        (
            {"compress_gradients": "bfloat16", "compute": ComputeConfig(precision="float64")},
            "compress_gradients is 'bfloat16'; allowed: 'none' with compute.precision float64",
        ),
        ({"profile": True, "max_steps": 7}, "profile is True; allowed: False with max_steps below"),
        (
            {"strategy": "push_pull", "compute": ComputeConfig(precision="float64")},
            "compute.precision is 'float64'; allowed: float32 or bfloat16 with strategy push_pull",
        ),
        (
            {
                "strategy": "push_pull",
                "servers": ServersConfig(factors=True),
                "compute": ComputeConfig(compile=True),
            },
            "compute.compile is True; allowed: False with servers.factors",
        ),
        (
            {
                "strategy": "push_pull",
                "servers": ServersConfig(commit_first=2),
                "optimizer": OptimizerConfig(clip_norm=1.0),
            },
            "optimizer.clip_norm is 1.0; allowed: None with servers.commit_first",
        ),
        (
            {"strategy": "push_pull", "servers": ServersConfig(commit_first=9), "num_workers": 8},
            "servers.commit_first is 9; allowed: at most num_workers, which is 8",
        ),
    ],
)
def test_a_run_says_what_is_wrong(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, **values)


def test_max_steps_bounds_the_places_of_a_run() -> None:
    assert replace(CONFIG, num_epochs=3).num_places(100) == 300
    assert replace(CONFIG, num_epochs=3, max_steps=5).num_places(100) == 40
    assert replace(CONFIG, num_epochs=3, max_steps=500).num_places(100) == 300


def test_another_network_keeps_what_both_have() -> None:
    model = ModelConfig(width=0.5, fc=(7,), middle_modules=2, num_classes=3)
    assert model.of_network("resnet50") == ModelConfig(
        name="resnet50", width=0.5, fc=(7,), num_classes=3
    )
    assert model.of_network("vgg16") == ModelConfig(name="vgg16", width=0.5, num_classes=3)
    assert model.of_network("xception") == model


@pytest.mark.parametrize(
    ("every", "unit", "samples"),
    [(100, "samples", 100), (2, "epochs", 1000), (0.5, "epochs", 250), (3, "steps", 24)],
)
def test_a_decay_is_converted_to_samples(every: float, unit: Any, samples: int) -> None:
    optimizer = OptimizerConfig(decay_every=every, decay_unit=unit)
    resolved = replace(CONFIG, optimizer=optimizer).resolved(500).optimizer
    assert (resolved.decay_every, resolved.decay_unit) == (samples, "samples")


@pytest.mark.parametrize(
    ("name", "l2"), [("xception", 1e-5), ("inception_v3", 4e-5), ("resnet50", 1e-5)]
)
def test_the_papers_l2_is_that_of_the_network(name: str, l2: float) -> None:
    config = replace(CONFIG, model=ModelConfig(name=name))
    assert config.resolved(1).optimizer.l2 == l2
    given = replace(config, optimizer=OptimizerConfig(l2=0.5))
    assert given.resolved(1).optimizer.l2 == 0.5


@pytest.mark.parametrize("config", [*SYNC_PRESETS.values(), *ASYNC_PRESETS.values()])
def test_presets_survive_json(config: TrainConfig) -> None:
    assert json.loads(json.dumps(config.to_json()))["batch_size"] == config.batch_size
