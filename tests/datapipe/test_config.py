"""DataConfig: a wrong value says what is allowed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from datapipe.config import DataConfig

VALID = DataConfig(train="somewhere")


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("train", "", "a directory or URL of shards"),
        ("evaluation", "", "a directory or URL of shards, or None"),
        ("image_size", 7, "8 to 4096"),
        ("image_size", 10**6, "8 to 4096"),
        ("crop_area", (0.0, 1.0), "0 < smallest <= largest <= 1"),
        ("crop_area", (0.5, 1.1), "0 < smallest <= largest <= 1"),
        ("crop_aspect", (1.5, 0.5), "0 < smallest <= largest"),
        ("crop_aspect", (float("nan"), 1.0), "0 < smallest <= largest"),
        ("evaluation_crop", 0.0, "above 0, at most 1"),
        ("evaluation_crop", 1.01, "above 0, at most 1"),
        ("block_size", 0, "1 to 16384"),
        ("block_size", 10**9, "1 to 16384"),
        ("blocks_per_pool", 0, "1 to 1024"),
        ("blocks_per_pool", 10**9, "1 to 1024"),
        ("decode_threads", 0, "1 to 256"),
        ("decode_threads", 10**6, "1 to 256"),
        ("read_threads", 0, "1 to 100"),
        ("read_threads", 101, "1 to 100"),
        ("read_ahead_mb", 0.0, "0.001 to 1000000"),
        ("read_retries", -1, "0 to 1000"),
        ("read_timeout_s", 0.0, "0.01 to 300"),
        ("read_timeout_s", float("nan"), "0.01 to 300"),
        ("read_timeout_s", 301.0, "0.01 to 300"),
        ("cache_gb", 0.0, "0.001 to 1000000"),
        ("cache_dir", "", "a directory of this machine, or None"),
        ("cache_dir", "s3://bucket/cache", "a directory of this machine, or None"),
        ("prefetch_batches", 0, "1 to 1024"),
        ("prefetch_batches", 10**6, "1 to 1024"),
        ("max_bad_samples", -1, "a whole number from 0, or a share below 1"),
        ("max_bad_samples", 1.5, "a whole number from 0, or a share below 1"),
        *(
            ("mix_weights", (weight,), r"a number above 0 for .* \(1\), or none")
            for weight in (0.0, float("nan"), float("inf"))
        ),
        ("mix", ("",), "directories or URLs of shards"),
    ],
)
def test_a_wrong_value_says_what_is_allowed(field: str, value: Any, allowed: str) -> None:
    with pytest.raises(ValueError, match=rf"^data\.{field} is .*; allowed: {allowed}$"):
        replace(VALID, **{field: value})


@pytest.mark.parametrize(
    "values",
    [
        {"image_size": 8, "evaluation_crop": 1.0, "crop_area": (1.0, 1.0), "max_bad_samples": 0},
        {"image_size": 4096, "block_size": 16_384, "blocks_per_pool": 1024, "decode_threads": 256},
    ],
)
def test_the_limits_themselves_are_allowed(values: dict[str, Any]) -> None:
    replace(VALID, **values)


@pytest.mark.parametrize(
    ("value", "allowed"), [(0, 0), (100, 100), (0.01, 20), (1e-9, 0), (1.0, 1)]
)
def test_bad_samples_are_allowed_by_number_or_share(value: float, allowed: int) -> None:
    config = DataConfig(train="train", max_bad_samples=value)
    assert config.bad_samples_allowed(2000) == allowed


def test_weights_that_have_no_sum_are_refused() -> None:
    for weights in ((1.0, float("nan")), (1e308, 1e308)):
        with pytest.raises(ValueError, match="mix_weights"):
            replace(VALID, mix=("more",), mix_weights=weights)
