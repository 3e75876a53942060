"""Weights from elsewhere, and how they are fitted to a network: all of them or none.

Whatever a file calls its weights, they are found by a naming, compared in the file's own shapes,
and taken over only when nothing is missing, surplus or of another shape.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from xdist.errors import UserError
from xdist.model_config import ModelConfig
from xdist.models import MODELS, Network, build_model
from xdist.naming import Naming, namings

HEAD_BIAS = "classifier.bias"
NUM_LISTED = 10  # of hundreds, when the file is of another network


@dataclass(frozen=True)
class Found:
    """What a file holds: tensors by the names that a naming knows."""

    source: str
    tensors: dict[str, Tensor]
    labels: Mapping[str, str] = field(default_factory=dict)
    """What the file itself calls them, where that is another name."""


@dataclass(frozen=True)
class Fitted:
    """A network with its weights, in evaluation mode, on the CPU."""

    model: ModelConfig
    network: nn.Module
    style: str
    """In whose naming the weights were found."""


def fit(found: Found, models: Sequence[ModelConfig]) -> Fitted:
    """The one of these networks whose names, in any naming, are the most like those found, with the
    weights found.

    The number of classes is that of the weights. Raises `UserError` that lists what does not fit.
    """
    model, style, naming = _closest(found, models)
    num_classes = _num_classes(found, naming)
    shapes = _skeleton(model, num_classes=num_classes).state_dict()
    problems = "; ".join(_problems(found, naming, shapes))
    if problems:
        raise UserError(
            f"{found.source}: nothing converted, as it does not fit {model.name} with "
            f"{num_classes} classes in the naming of {style}: {problems}; where the options of the "
            "network are not the paper's, give --model the config.json of its run"
        )
    network = build_model(model, num_classes=num_classes, head_bias=0.0, seed=0).eval()
    state = network.state_dict()
    for name, place in naming.items():
        state[place.name].copy_(place.ours(found.tensors[name]))
    return Fitted(replace(model, num_classes=num_classes), network, style)


def _closest(found: Found, models: Sequence[ModelConfig]) -> tuple[ModelConfig, str, Naming]:
    """Network, style and naming that has exactly the names found, or the largest share of both."""
    candidates = []
    for model in models:
        for style, naming in namings(_skeleton(model)).items():
            if naming.keys() == found.tensors.keys():
                return model, style, naming
            candidates.append((model, style, naming))
    closest = max(candidates, key=lambda item: _likeness(item[2], found))
    if closest[2].keys().isdisjoint(found.tensors):
        known = ", ".join(f"{model.name} ({style})" for model, style, _ in candidates)
        raise UserError(f"{found.source}: holds weights of none of these: {known}")
    return closest


def _likeness(naming: Naming, found: Found) -> float:
    """Share of the names of either side that both have."""
    names = found.tensors.keys()
    return len(naming.keys() & names) / len(naming.keys() | names)


def _skeleton(model: ModelConfig, *, num_classes: int = 1) -> Network:
    """The network without values, for the names and shapes of its weights."""
    with torch.device("meta"):
        return MODELS[model.name](num_classes=num_classes, **model.options())


def _num_classes(found: Found, naming: Naming) -> int:
    """Of the weights found; 1 where they lack the classifier, which is a problem listed later."""
    biases = [name for name, place in naming.items() if place.name == HEAD_BIAS]
    tensors = [found.tensors[name] for name in biases if name in found.tensors]
    return max(1, tensors[0].numel()) if tensors else 1


def _problems(found: Found, naming: Naming, state: Mapping[str, Tensor]) -> Iterator[str]:
    """What does not fit, as up to three texts."""
    shapes = {name: tuple(place.foreign(state[place.name]).shape) for name, place in naming.items()}
    misfits = [
        f"{_label(found, name, naming)} has shape {tuple(found.tensors[name].shape)}, needed is "
        f"{shape}"
        for name, shape in shapes.items()
        if name in found.tensors and tuple(found.tensors[name].shape) != shape
    ]
    missing = [_label(found, name, naming) for name in naming if name not in found.tensors]
    surplus = [found.labels.get(name, name) for name in found.tensors if name not in naming]
    for what, names in (("", misfits), ("missing ", missing), ("surplus ", surplus)):
        if names:
            more = f" and {len(names) - NUM_LISTED} more" if len(names) > NUM_LISTED else ""
            yield what + ", ".join(names[:NUM_LISTED]) + more


def _label(found: Found, name: str, naming: Naming) -> str:
    """What the file calls a weight, and what it is called here."""
    label, ours = found.labels.get(name, name), naming[name].name
    return label if label == ours else f"{label} ({ours})"
