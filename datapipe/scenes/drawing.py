"""Drawing of synthetic scenes with Pillow: shapes as polygons, filled with a texture."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from datapipe.scenes import Scene, SceneObject

Rgb = tuple[int, int, int]

SUPERSAMPLING = 2
RGB_OF_COLOR: dict[str, Rgb] = {
    "red": (214, 30, 34),
    "blue": (36, 66, 220),
    "yellow": (244, 220, 30),
    "green": (30, 150, 48),
    "white": (248, 248, 248),
    "orange": (246, 134, 16),
    "purple": (128, 40, 170),
    "black": (16, 16, 16),
    "cyan": (44, 208, 222),
    "pink": (248, 128, 188),
    "grey": (128, 128, 128),
    "brown": (112, 62, 24),
}
RGB_OF_BACKGROUND: dict[str, tuple[Rgb, Rgb]] = {  # at the top, at the bottom
    "sky": ((150, 188, 222), (206, 222, 236)),
    "meadow": ((140, 170, 116), (98, 136, 84)),
    "beach": ((226, 212, 176), (200, 180, 136)),
    "night": ((24, 26, 52), (52, 48, 82)),
    "dusk": ((164, 120, 132), (96, 76, 104)),
    "sea": ((84, 128, 146), (40, 82, 108)),
}

POINTS_OF_SHAPE = {
    "bar": ((-0.95, -0.3), (0.95, -0.3), (0.95, 0.3), (-0.95, 0.3)),
    "diamond": ((0, -1), (0.6, 0), (0, 1), (-0.6, 0)),
    "trapezoid": ((-0.4, -0.55), (0.4, -0.55), (0.8, 0.55), (-0.8, 0.55)),
    "arrow": ((-0.9, -0.2), (0.1, -0.2), (0.1, -0.7), (0.95, 0), (0.1, 0.7), (0.1, 0.2),
              (-0.9, 0.2)),
    "cross": ((-0.28, -0.95), (0.28, -0.95), (0.28, -0.28), (0.95, -0.28), (0.95, 0.28),
              (0.28, 0.28), (0.28, 0.95), (-0.28, 0.95), (-0.28, 0.28), (-0.95, 0.28),
              (-0.95, -0.28), (-0.28, -0.28)),
    "bolt": ((0.1, -0.95), (-0.55, 0.15), (-0.05, 0.15), (-0.2, 0.95), (0.55, -0.25),
             (0.05, -0.25), (0.4, -0.9)),
}  # fmt: skip
TIPS_OF_SHAPE = {  # number of tips, radius between two tips, angle of the first in degrees
    "square": (4, 0.707, 45.0),
    "triangle": (3, 0.5, -90.0),
    "hexagon": (6, 0.866, 0.0),
    "star": (5, 0.42, -90.0),
    "sun": (10, 0.6, -90.0),
}


def draw(scene: Scene, *, image_size: int) -> Image.Image:
    """The scene as a square RGB image."""
    size = image_size * SUPERSAMPLING
    generator = np.random.default_rng(scene.noise_seed)
    top, bottom = (np.array(rgb, np.float32) for rgb in RGB_OF_BACKGROUND[scene.background])
    height = np.linspace(0, 1, image_size, dtype=np.float32)[:, None, None]
    noise = generator.standard_normal((image_size, image_size, 1), dtype=np.float32) * 6
    pixels = np.clip(top + (bottom - top) * height + noise, 0, 255).astype(np.uint8)
    canvas = Image.fromarray(pixels).resize((size, size), Image.Resampling.NEAREST)
    for item in scene.objects:
        _draw_object(canvas, item)
    return canvas.reduce(SUPERSAMPLING)


def _draw_object(canvas: Image.Image, item: SceneObject) -> None:
    size, radius = canvas.width, item.radius * canvas.width
    left, top = int(item.x * size - radius) - 1, int(item.y * size - radius) - 1
    side = math.ceil(2 * radius) + 3
    center = np.array([item.x * size - left, item.y * size - top])
    turn = np.array(
        [
            [math.cos(item.angle), math.sin(item.angle)],
            [-math.sin(item.angle), math.cos(item.angle)],
        ]
    )
    mask = Image.new("L", (side, side), 0)
    tile = Image.new("RGB", (side, side), RGB_OF_COLOR[item.color])
    pattern = ImageDraw.Draw(tile)
    accent = _accent(RGB_OF_COLOR[item.color])
    _draw_texture(pattern, item.texture, side=side, color=accent)
    for outline, fill in zip(outlines(item.shape), (255, 0), strict=False):
        points = [(float(x), float(y)) for x, y in outline * radius @ turn + center]
        ImageDraw.Draw(mask).polygon(points, fill=fill)
        if item.texture == "rimmed":
            pattern.line([*points, *points[:2]], fill=accent, width=round(0.4 * radius))
    canvas.paste(tile, (left, top), mask)


def _accent(color: Rgb) -> Rgb:
    """The colour of the pattern: the object's, clearly lighter or darker."""
    red, green, blue = color
    target = 0 if 0.299 * red + 0.587 * green + 0.114 * blue > 110 else 255
    mixed = [round(0.4 * part + 0.6 * target) for part in color]
    return mixed[0], mixed[1], mixed[2]


def _draw_texture(pattern: ImageDraw.ImageDraw, texture: str, *, side: int, color: Rgb) -> None:
    """Four stripes, or a grid of dots or squares, over the whole tile."""
    cell = side / 8
    if texture == "striped":
        for row in range(0, 8, 2):
            pattern.rectangle((0, row * cell, side, (row + 1) * cell - 1), fill=color)
    elif texture in ("dotted", "checked"):
        for row in range(8):
            for column in range(row % 2, 8, 2):
                x, y = column * cell, row * cell
                if texture == "checked":
                    pattern.rectangle((x, y, x + cell - 1, y + cell - 1), fill=color)
                elif column % 2 == 0:
                    pattern.ellipse((x, y, x + 1.2 * cell, y + 1.2 * cell), fill=color)


def outlines(shape: str) -> tuple[NDArray[np.float64], ...]:
    """The shape's outline, (points, 2) within the unit circle, y downwards; then its hole's."""
    if shape in POINTS_OF_SHAPE:
        return (np.array(POINTS_OF_SHAPE[shape], np.float64),)
    if shape in TIPS_OF_SHAPE:
        return (_star(*TIPS_OF_SHAPE[shape]),)
    if shape == "ring":
        return (_arc(0, 360), _arc(0, 360) * 0.5)
    if shape == "half disc":
        return (np.add(_arc(180, 360), (0.0, 0.4)),)
    if shape == "crescent":
        return (np.concatenate([_arc(50, 310), np.add(_arc(310, 50) * 0.8, (0.35, 0.0))]),)
    return (_arc(0, 360) * {"circle": (1.0, 1.0), "ellipse": (1.0, 0.55)}[shape],)


def _arc(start: float, stop: float) -> NDArray[np.float64]:
    """The unit circle between two angles in degrees, by way of 180 from 310 to 50."""
    angles = np.radians(np.linspace(start, stop, 32))
    return np.stack([np.cos(angles), np.sin(angles)], axis=1)


def _star(num_tips: int, inner_radius: float, first_angle: float) -> NDArray[np.float64]:
    """Tips at radius 1; between them, cos(180 degrees / tips) makes a regular polygon."""
    angles = np.radians(np.arange(2 * num_tips) * 180 / num_tips + first_angle)
    radii = np.where(np.arange(2 * num_tips) % 2 == 0, 1.0, inner_radius)
    return np.stack([np.cos(angles), np.sin(angles)], axis=1) * radii[:, None]
