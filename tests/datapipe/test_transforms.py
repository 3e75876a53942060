"""Crops: inside the image, within the configured ranges, a function of (seed, epoch, sample)."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from datapipe.config import DataConfig
from datapipe.transforms import augmentation_draws, evaluation_boxes, training_boxes

CONFIG = DataConfig(train="unused")
sides = st.integers(1, 5000)


def draws_of(
    count: int, *, seed: int = 1, epoch: int = 0
) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    ids = np.arange(count, dtype=np.int64)
    return augmentation_draws(seed, np.full(count, epoch, np.int64), ids)


@given(sides, sides)
def test_every_box_lies_in_the_image(width: int, height: int) -> None:
    sizes = np.full(20, width, np.float64), np.full(20, height, np.float64)
    random_boxes, _ = training_boxes(*sizes, draws_of(20), CONFIG)
    for boxes in (random_boxes, evaluation_boxes(*sizes, CONFIG)):
        left, top, right, bottom = boxes.T
        assert (left >= 0).all()
        assert (top >= 0).all()
        assert (left < right).all()
        assert (top < bottom).all()
        assert (right <= width).all()
        assert (bottom <= height).all()


def test_areas_and_aspects_fill_the_configured_ranges() -> None:
    count = 5000
    size = np.full(count, 400.0)
    boxes, flips = training_boxes(size, size, draws_of(count), CONFIG)
    widths, heights = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    areas, aspects = widths * heights / 400**2, widths / heights
    assert areas.min() >= 0.08 - 1e-9
    assert areas.max() <= 1 + 1e-9
    assert aspects.min() >= 3 / 4 - 1e-9
    assert aspects.max() <= 4 / 3 + 1e-9
    assert areas.min() < 0.1
    assert areas.max() > 0.95
    assert abs(flips.mean() - 0.5) < 0.03  # four standard errors of 5,000 coin tosses


def test_place_and_shape_of_the_crop_are_drawn_apart() -> None:
    count = 5000
    widths, heights = np.full(count, 400.0), np.full(count, 300.0)
    boxes, flips = training_boxes(widths, heights, draws_of(count), CONFIG)
    left, top, right, bottom = boxes.T
    inside = (right - left < 399) & (bottom - top < 299)
    shift_x, shift_y = left / (400 - (right - left)), top / (300 - (bottom - top))
    aspects = (right - left) / (bottom - top)
    drawn = np.stack([shift_x, shift_y, np.log(aspects), flips])[:, inside]
    for shifts in drawn[:2]:
        # Quartiles of a uniform draw; the standard error of each is 0.006 to 0.007.
        assert np.abs(np.quantile(shifts, [0.25, 0.5, 0.75]) - [0.25, 0.5, 0.75]).max() < 0.03
    assert aspects.min() < 0.77
    assert aspects.max() > 1.31
    # The standard error of a correlation of so many pairs is 0.014.
    assert np.abs(np.corrcoef(drawn) - np.eye(4)).max() < 0.06


def test_an_image_too_long_for_any_crop_gives_its_centre() -> None:
    boxes, _ = training_boxes(np.array([1000.0]), np.array([10.0]), draws_of(1), CONFIG)
    left, top, right, bottom = boxes[0]
    assert (top, bottom) == (0, 10)
    assert right - left == pytest.approx(10 * 4 / 3)
    assert left + right == pytest.approx(1000)


def test_the_evaluation_crop_is_the_centre_square() -> None:
    boxes = evaluation_boxes(np.array([500.0]), np.array([375.0]), CONFIG)
    side = 375 * 0.875
    expected = [250 - side / 2, 187.5 - side / 2, 250 + side / 2, 187.5 + side / 2]
    assert boxes[0].tolist() == pytest.approx(expected)


def test_draws_depend_on_seed_epoch_and_sample_alone() -> None:
    draws = draws_of(10)
    assert np.array_equal(draws[3:7], augmentation_draws(1, np.zeros(4, np.int64), np.arange(3, 7)))
    for other in (draws_of(10, seed=2), draws_of(10, epoch=1)):
        assert not np.isin(draws, other).any()
    assert np.unique(draws).size == draws.size


def test_flips_can_be_turned_off() -> None:
    config = DataConfig(train="unused", flip=False)
    _, flips = training_boxes(np.full(50, 9.0), np.full(50, 9.0), draws_of(50), config)
    assert not flips.any()
