"""What holds for every network: its size, its choice by name, its weights, its training."""

from __future__ import annotations

import functools
import inspect
from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.strategies import collect_gradients
from xdist import losses
from xdist.flat import FlatModel
from xdist.model_config import MODEL_NAMES, MODEL_OPTIONS, ModelConfig
from xdist.models import MODELS, Network, build_model

SMALL: dict[str, dict[str, Any]] = {
    "xception": {"middle_modules": 1},
    "inception_v3": {"small_input": True},
}
every_network = pytest.mark.parametrize("name", MODEL_NAMES)
every_class = pytest.mark.parametrize(
    "name", ["xception", "inception_v3", "vgg_separable", "vgg16", "resnet50"]
)


def full_network(config: ModelConfig, *, num_classes: int = 1000) -> Network:
    """The network in its own size, without memory."""
    with torch.device("meta"):
        return MODELS[config.name](num_classes=num_classes, **config.options())


def small_network(name: str, *, seed: int = 0, **options: Any) -> Network:
    config = ModelConfig(name=name, width=0.125, **SMALL.get(name, {}), **options)
    return build_model(config, num_classes=5, head_bias=0.0, seed=seed)


def images(num_images: int = 4, size: int = 32) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return 2 * torch.rand(num_images, 3, size, size, generator=generator) - 1


def batch_norms(network: nn.Module) -> list[nn.BatchNorm2d]:
    return [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]


@pytest.mark.parametrize(
    ("name", "options", "num_parameters"),
    [
        ("xception", {}, 22_855_952),
        ("inception_v3", {}, 23_817_352),
        ("inception_v3", {"small_input": True}, 23_817_352),
        ("inception_v3", {"layout": "2016"}, 23_626_728),
        ("vgg_separable", {}, 2_190_888),
        ("vgg_separable", {"fc": (4096, 4096)}, 24_657_448),
        ("vgg_separable", {"fc": (4096, 4096), "pooled_size": 7}, 125_320_744),
        ("vgg16", {}, 138_357_544),
        ("resnet50", {}, 25_583_592),
        ("resnet101", {}, 44_601_832),
        ("resnet152", {}, 60_268_520),
        ("resnet50", {"conv_bias": False}, 25_557_032),
        ("resnet101", {"conv_bias": False}, 44_549_160),
        ("resnet152", {"conv_bias": False}, 60_192_808),
    ],
    ids=str,
)
def test_parameter_counts_with_1000_classes_are_the_published_ones(
    name: str, options: dict[str, Any], num_parameters: int
) -> None:
    network = full_network(ModelConfig(name=name, **options))
    assert sum(parameter.numel() for parameter in network.parameters()) == num_parameters


def test_inception_of_2016_has_the_count_of_the_jft_experiment_with_17_000_classes() -> None:
    network = full_network(ModelConfig(name="inception_v3", layout="2016"), num_classes=17_000)
    assert sum(parameter.numel() for parameter in network.parameters()) == 56_410_728


@pytest.mark.parametrize("size", [299, 150])
@every_network
def test_full_networks_turn_images_into_logits(name: str, size: int) -> None:
    logits = full_network(ModelConfig(name=name))(torch.empty(2, 3, size, size, device="meta"))
    assert (logits.shape, logits.dtype) == ((2, 1000), torch.float32)


@pytest.mark.parametrize(
    "config",
    [
        *(ModelConfig(name=name) for name in MODEL_NAMES),
        ModelConfig(name="inception_v3", small_input=True),
    ],
    ids=str,
)
def test_the_least_image_size_is_the_least_that_works(config: ModelConfig) -> None:
    network, least = full_network(config).eval(), config.least_image_size
    network(torch.empty(1, 3, least, least, device="meta"))
    if least > 1:
        with pytest.raises(RuntimeError, match=r"(?i)size"):
            network(torch.empty(1, 3, least - 1, least - 1, device="meta"))


def test_the_configuration_knows_every_network() -> None:
    assert tuple(MODELS) == MODEL_NAMES


@every_network
def test_every_argument_of_a_network_is_a_field_with_the_same_default(name: str) -> None:
    network = MODELS[name]
    fixed = network.keywords if isinstance(network, functools.partial) else {}
    arguments = inspect.signature(network).parameters
    given = {"num_classes", "head_bias", *fixed}
    defaults = {key: value.default for key, value in arguments.items() if key not in given}
    assert defaults == ModelConfig(name=name).options()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("xception", {"middle_modules": 1, "residual": False, "mid_activation": "elu"}),
        ("xception", {"segments": 3, "fc": (8,), "dropout": 0.25}),
        ("inception_v3", {"layout": "2016", "small_input": True, "fc": (8,), "dropout": 0.25}),
        ("vgg_separable", {"pooled_size": 2, "fc": (8,), "dropout": 0.25}),
        ("vgg16", {"dropout": 0.25}),
        ("resnet50", {"conv_bias": False, "fc": (8,), "dropout": 0.25}),
    ],
    ids=str,
)
def test_every_option_of_the_configuration_reaches_the_network(
    name: str, options: dict[str, Any]
) -> None:
    config = ModelConfig(name=name, width=0.125, **options)
    network = build_model(config, num_classes=5, head_bias=0.0, seed=0)
    assert str(network) == str(MODELS[name](num_classes=5, width=0.125, **options))
    assert str(network) != str(MODELS[name](num_classes=5, width=0.125))


@every_network
def test_a_field_of_other_networks_alone_is_refused(name: str) -> None:
    others: dict[str, Any] = {
        "fc": (8,), "middle_modules": 2, "residual": False, "mid_activation": "relu",
        "segments": 4, "layout": "2016", "small_input": True, "pooled_size": 7, "conv_bias": False,
    }  # fmt: skip
    shared = {"name", "num_classes", "width", "dropout"}
    assert others.keys() == {field.name for field in fields(ModelConfig)} - shared
    for option in others.keys() - set(MODEL_OPTIONS[name]):
        with pytest.raises(ValueError, match=rf"^model\.{option} is .* with {name}; a field of "):
            ModelConfig(name=name, **{option: others[option]})


def test_a_refused_field_says_what_is_allowed_and_whose_it_is() -> None:
    message = "model.layout is '2016'; allowed: 'today' with resnet50; a field of inception_v3"
    with pytest.raises(ValueError, match=message):
        ModelConfig(name="resnet50", layout="2016")


@every_class
def test_built_weights_depend_on_the_seed_alone(name: str) -> None:
    before = torch.get_rng_state()
    state = small_network(name, seed=1).state_dict()
    assert torch.equal(torch.get_rng_state(), before)  # the global generator was not used
    again, other = (small_network(name, seed=seed).state_dict() for seed in (1, 2))
    assert all(torch.equal(value, again[key]) for key, value in state.items())
    kernels = [key for key, value in state.items() if value.ndim > 1]
    assert not any(torch.equal(state[key], other[key]) for key in kernels)
    assert all(value.isfinite().all() for value in state.values())


@every_class
def test_the_classifier_starts_at_the_head_bias(name: str) -> None:
    config = ModelConfig(name=name, width=0.125)
    network = build_model(config, num_classes=5, head_bias=-3.0, seed=0)
    assert (network.classifier.bias == -3).all()


@every_class
def test_initial_weights_keep_the_scale_of_what_they_pass_on(name: str) -> None:
    """Logits of random images are neither lost nor huge: the classifier sees order 1."""
    seen: list[Tensor] = []
    network = small_network(name).train()
    network.classifier.register_forward_hook(lambda _module, inputs, _output: seen.extend(inputs))
    network(images())
    assert 0.05 < seen[0].square().mean().sqrt() < 20


@every_class
def test_dropout_changes_logits_in_training_only(name: str) -> None:
    network = small_network(name, dropout=0.5).train()
    for norm in batch_norms(network):
        norm.eval()  # so that dropout alone is random
    assert not torch.equal(network(images()), network(images()))
    network.eval()
    assert torch.equal(network(images()), network(images()))


@pytest.mark.parametrize("name", ["xception", "inception_v3", "vgg_separable", "resnet50"])
def test_training_moves_every_batch_norm_with_the_sources_momentum(name: str) -> None:
    network = small_network(name).train()
    norms = batch_norms(network)
    assert {norm.momentum for norm in norms} == {0.01}
    assert {norm.eps for norm in norms} == {1.001e-5 if "resnet" in name else 1e-3}
    network(images())
    for norm in norms:
        assert norm.running_mean is not None
        assert norm.running_var is not None
        assert (norm.running_mean != 0).any()
        assert (norm.running_var != 1).any()


@pytest.mark.parametrize("layout", ["today", "2016"])
def test_inception_trains_in_both_layouts(layout: str) -> None:
    assert_one_step_lowers_the_loss(small_network("inception_v3", layout=layout))


@every_network
def test_one_step_over_the_flat_vector_lowers_the_loss(name: str) -> None:
    assert_one_step_lowers_the_loss(small_network(name))


def assert_one_step_lowers_the_loss(network: Network) -> None:
    """A step as long as lowers the loss by 0.01, if the gradient is right and does not turn."""
    flat = FlatModel(network.train())
    batch, label_ids, label_offsets = images(8, size=48), torch.arange(8) % 5, torch.arange(9)

    def loss() -> Tensor:
        per_sample = losses.softmax_cross_entropy(network(batch), label_ids, label_offsets)
        return per_sample.mean()

    before = loss()
    torch.autograd.backward(before)
    collect_gradients(flat)
    assert flat.gradients.isfinite().all()
    for entry in flat.layout.parameters:
        assert entry.view(flat.gradients).any(), entry.name
    flat.weights.sub_(flat.gradients, alpha=0.01 / flat.gradients.square().sum().item())
    assert 0.001 < (before - loss()).item() < 0.02


@every_class
def test_memory_format_of_the_input_changes_nothing_but_rounding(name: str) -> None:
    network = small_network(name).eval()
    channels_last = images().to(memory_format=torch.channels_last)
    torch.testing.assert_close(network(channels_last), network(images()), rtol=1e-4, atol=1e-5)
