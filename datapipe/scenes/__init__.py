"""Synthetic scenes: what is on an image, and its labels; pure functions of seeds.

A scene is a background and one to three objects; an object is a shape in a colour with a texture.
Its labels form a hierarchy: shape below shape family ("star", "spiky"), colour below colour family
("red", "warm"), texture below "patterned", and combinations ("red star", "striped star") below
both of their parts. Choices follow Zipf's law, so the labels have a long tail.

Scene i of a split is a function of (seed, split, i), whatever the number of scenes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

Split = Literal["train", "evaluation"]
SPLITS: tuple[Split, ...] = ("train", "evaluation")

FAMILY_OF_SHAPE = {
    "circle": "round",
    "square": "quadrilateral",
    "triangle": "angular",
    "star": "spiky",
    "ellipse": "round",
    "bar": "quadrilateral",
    "cross": "spiky",
    "hexagon": "angular",
    "ring": "round",
    "diamond": "quadrilateral",
    "arrow": "angular",
    "crescent": "round",
    "sun": "spiky",
    "trapezoid": "quadrilateral",
    "bolt": "spiky",
    "half disc": "round",
}
FAMILY_OF_COLOR = {
    "red": "warm",
    "blue": "cool",
    "yellow": "warm",
    "green": "cool",
    "white": "neutral",
    "orange": "warm",
    "purple": "cool",
    "black": "neutral",
    "cyan": "cool",
    "pink": "warm",
    "grey": "neutral",
    "brown": "warm",
}
PLAIN, PATTERNED = "plain", "patterned"
TEXTURES = (PLAIN, "striped", "dotted", "checked", "rimmed")
BACKGROUNDS = ("sky", "meadow", "beach", "night", "dusk", "sea")
NUM_OBJECTS_SHARES = (0.1, 0.5, 0.4)
MIN_LABELS, MAX_LABELS = 5, 15
NUM_CANDIDATES = 6


def label_names() -> tuple[str, ...]:
    """All labels; a label's id is its place here."""
    shapes, patterns = tuple(FAMILY_OF_SHAPE), TEXTURES[1:]
    return (
        *dict.fromkeys(FAMILY_OF_SHAPE.values()),
        *dict.fromkeys(FAMILY_OF_COLOR.values()),
        PATTERNED,
        *shapes,
        *FAMILY_OF_COLOR,
        *patterns,
        *BACKGROUNDS,
        *(f"{color} {shape}" for color in FAMILY_OF_COLOR for shape in shapes),
        *(f"{pattern} {shape}" for pattern in patterns for shape in shapes),
    )


@dataclass(frozen=True)
class SceneObject:
    """A shape at a place; lengths are shares of the image's side, angles radians."""

    shape: str
    color: str
    texture: str
    x: float
    y: float
    radius: float
    angle: float

    def labels(self) -> tuple[str, ...]:
        """Five for a plain object, eight for a patterned one."""
        plain = (
            self.shape,
            FAMILY_OF_SHAPE[self.shape],
            self.color,
            FAMILY_OF_COLOR[self.color],
            f"{self.color} {self.shape}",
        )
        if self.texture == PLAIN:
            return plain
        return (*plain, self.texture, PATTERNED, f"{self.texture} {self.shape}")


@dataclass(frozen=True)
class Scene:
    """What is on an image."""

    background: str
    objects: tuple[SceneObject, ...]
    noise_seed: int

    def labels(self) -> frozenset[str]:
        """MIN_LABELS to MAX_LABELS names."""
        return frozenset((self.background, *(n for o in self.objects for n in o.labels())))


def scene(seed: int, split: Split, number: int) -> Scene:
    """Scene `number` of a split. Objects that would be a label too many are left out."""
    generator = np.random.default_rng((seed, SPLITS.index(split), number))
    background = _zipf_choice(generator, BACKGROUNDS)
    num_objects = 1 + int(generator.choice(len(NUM_OBJECTS_SHARES), p=NUM_OBJECTS_SHARES))
    drawn = Scene(background, (), int(generator.integers(1 << 32)))
    for _ in range(NUM_CANDIDATES):
        candidate = _place_object(generator, drawn.objects)
        more = Scene(background, (*drawn.objects, candidate), drawn.noise_seed)
        if len(more.labels()) <= MAX_LABELS:
            drawn = more
        if len(drawn.objects) == num_objects:
            break
    return drawn


def _place_object(
    generator: np.random.Generator, others: Sequence[SceneObject], *, num_tries: int = 8
) -> SceneObject:
    """A new object, at that one of a few random places which is farthest from the others."""
    shape = _zipf_choice(generator, tuple(FAMILY_OF_SHAPE))
    color = _zipf_choice(generator, tuple(FAMILY_OF_COLOR))
    texture = _zipf_choice(generator, TEXTURES)
    radius = float(generator.uniform(0.17, 0.27))
    places = generator.uniform(radius, 1 - radius, size=(num_tries, 2))
    gaps = [
        min((math.hypot(x - o.x, y - o.y) - o.radius for o in others), default=1.0)
        for x, y in places
    ]
    x, y = places[int(np.argmax(gaps))]
    angle = float(generator.uniform(-0.4, 0.4))
    return SceneObject(shape, color, texture, float(x), float(y), radius, angle)


def _zipf_choice(generator: np.random.Generator, names: Sequence[str]) -> str:
    """The k-th name with a probability in proportion to 1 / k."""
    cumulated = np.cumsum(1 / np.arange(1, len(names) + 1))
    return names[int(np.searchsorted(cumulated, generator.random() * cumulated[-1], side="right"))]
