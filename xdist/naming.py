"""What other programs call the weights of our networks.

A `Naming` gives each foreign name the place of that weight here. Keras Applications is known by the
paths inside a Keras 3 weights file, which count the layers of a kind in the order of the graph:
names such as `conv2d_4`, which depend on what else the process has built, mean nothing. timm is
known by its `legacy_xception`.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from xdist.models.inception_v3 import Branches, ConvNorm, InceptionV3
from xdist.models.xception import Module, SeparableConv, Xception

XDIST, TIMM, KERAS = "xdist", "timm's legacy_xception", "Keras Applications"
KERNEL = (2, 3, 1, 0)  # (out, in, height, width) -> Keras: (height, width, in, out)
DEPTHWISE = (2, 3, 0, 1)  # (channels, 1, height, width) -> Keras: (height, width, channels, 1)
DENSE = (1, 0)  # (out, in) -> Keras: (in, out)


@dataclass(frozen=True)
class Place:
    """A weight of ours: its name in the `state_dict`, and its axes in the foreign order; None where
    that is our own.
    """

    name: str
    axes: tuple[int, ...] | None = None

    def foreign(self, ours: Tensor) -> Tensor:
        """Our tensor as the other program has it."""
        return ours if self.axes is None else ours.permute(self.axes).contiguous()

    def ours(self, foreign: Tensor) -> Tensor:
        """The other program's tensor as we have it."""
        if self.axes is None:
            return foreign
        return foreign.permute([self.axes.index(axis) for axis in range(len(self.axes))])


Naming = dict[str, Place]


def namings(network: nn.Module) -> dict[str, Naming]:
    """All that this network's weights are called, by whose naming it is."""
    found = {XDIST: _own_naming(network)}
    if isinstance(network, Xception):
        found[TIMM] = _timm_naming(network)
    if isinstance(network, InceptionV3) or (
        isinstance(network, Xception) and _is_depthwise(network)
    ):
        found[KERAS] = _keras_naming(network)
    return found


def _is_depthwise(network: Xception) -> bool:
    spatial = [module.spatial for module in network.modules() if isinstance(module, SeparableConv)]
    return all(isinstance(conv, nn.Conv2d) and conv.groups == conv.in_channels for conv in spatial)


def _own_naming(network: nn.Module) -> Naming:
    """The names in the `state_dict`, without the counters of batches."""
    return {
        name: Place(name)
        for name in network.state_dict()
        if not name.endswith(".num_batches_tracked")
    }


def _keras_naming(network: Xception | InceptionV3) -> Naming:
    """`layers/conv2d_3/vars/0` is the first variable of the fourth Conv2D, and so on."""
    counts: Counter[str] = Counter()
    naming: Naming = {}
    for kind, places in _keras_layers(network):
        layer = f"{kind}_{counts[kind]}" if counts[kind] else kind
        counts[kind] += 1
        naming |= {f"layers/{layer}/vars/{i}": place for i, place in enumerate(places)}
    return naming


def _keras_layers(module: nn.Module, name: str = "") -> Iterator[tuple[str, list[Place]]]:
    """Keras' layers that have weights, as (kind, places of the weights in Keras' order).

    Layers of one kind come in the order of the graph, by which Keras numbers them.
    """
    match module:
        case SeparableConv():
            yield (
                "separable_conv2d",
                [Place(f"{name}.spatial.weight", DEPTHWISE), _kernel(f"{name}.pointwise")],
            )
            yield from _keras_layers(module.norm, f"{name}.norm")
        case nn.Conv2d():
            yield "conv2d", [_kernel(name), *_vectors(module, name, "bias")]
        case nn.Linear():
            yield "dense", [Place(f"{name}.weight", DENSE), *_vectors(module, name, "bias")]
        case nn.BatchNorm2d():
            vectors = ("weight", "bias", "running_mean", "running_var")
            yield "batch_normalization", _vectors(module, name, *vectors)
        case InceptionV3():
            for unit in (*_by_distance(module), "fc", "classifier"):
                yield from _keras_layers(module.get_submodule(unit), unit)
        case _:
            for child_name, child in module.named_children():
                yield from _keras_layers(child, f"{name}.{child_name}".lstrip("."))


def _by_distance(network: InceptionV3) -> list[str]:
    """The convolutions of Inception V3 as Keras sorts them: the farther from the output the
    earlier, and those at one distance as they were built.
    """
    mixed, start = _distances(network.mixed, "mixed", 0)
    stem, _ = _distances(network.stem, "stem", start)
    return [name for _, name in sorted(stem + mixed, key=lambda unit: -unit[0])]


def _distances(module: nn.Module, name: str, end: int) -> tuple[list[tuple[int, str]], int]:
    """The convolutions inside, as (distance from the output in Keras' layers, name), and the
    distance of what goes in; `end` is that of what comes out.
    """
    if isinstance(module, ConvNorm):
        return [(end, name)], end + 3  # Conv2D, BatchNormalization, Activation
    found: list[tuple[int, str]] = []
    if isinstance(module, Branches):
        starts = [end]
        for branch_name, branch in module.named_children():
            units, start = _distances(branch, f"{name}.{branch_name}", end + 1)
            found += units
            starts.append(start)
        return found, max(starts)
    if isinstance(module, nn.Sequential):
        for i in reversed(range(len(module))):
            units, end = _distances(module[i], f"{name}.{i}", end)
            found = units + found
        return found, end
    return [], end + 1  # a pool


def _kernel(name: str) -> Place:
    return Place(f"{name}.weight", KERNEL)


def _vectors(module: nn.Module, name: str, *vectors: str) -> list[Place]:
    """Places of those of the named vectors that the module has."""
    present = module.state_dict()
    return [Place(f"{name}.{vector}") for vector in vectors if vector in present]


def _timm_naming(network: Xception) -> Naming:
    """timm's `legacy_xception`; what it does not have keeps our name."""
    theirs = dict(_timm_modules(network))
    naming: Naming = {}
    for name, place in _own_naming(network).items():
        module, _, weight = name.rpartition(".")
        naming[f"{theirs.get(module, module)}.{weight}"] = place
    return naming


def _timm_modules(network: Xception) -> Iterator[tuple[str, str]]:
    """(our name, timm's name) of the modules that have weights."""
    yield from {"stem.0": "conv1", "stem.1": "bn1", "stem.3": "conv2", "stem.4": "bn2"}.items()
    flows = (("entry_flow", network.entry_flow), ("middle_flow", network.middle_flow))
    modules = [(f"{flow}.{i}", module) for flow, part in flows for i, module in enumerate(part)]
    modules.append(("exit_flow.0", network.exit_flow[0]))
    for number, (ours, module) in enumerate(modules, start=1):
        assert isinstance(module, Module)
        yield from _timm_block(module, ours, f"block{number}")
    yield from _timm_separable("exit_flow.1", "conv3", "bn3")
    yield from _timm_separable("exit_flow.3", "conv4", "bn4")
    yield "classifier", "fc"


def _timm_block(module: Module, ours: str, theirs: str) -> Iterator[tuple[str, str]]:
    places = itertools.count()  # timm's norms stand beside the convolutions, ours inside
    for i, layer in enumerate(module.layers):
        place = next(places)
        if isinstance(layer, SeparableConv):
            norm = f"{theirs}.rep.{next(places)}"
            yield from _timm_separable(f"{ours}.layers.{i}", f"{theirs}.rep.{place}", norm)
    yield from {f"{ours}.skip.0": f"{theirs}.skip", f"{ours}.skip.1": f"{theirs}.skipbn"}.items()


def _timm_separable(ours: str, conv: str, norm: str) -> Iterator[tuple[str, str]]:
    yield f"{ours}.spatial", f"{conv}.conv1"
    yield f"{ours}.pointwise", f"{conv}.pointwise"
    yield f"{ours}.norm", norm
