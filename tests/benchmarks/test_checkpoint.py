"""The figures of bench-checkpoint."""

from __future__ import annotations

import pytest

from tests.benchmarks.checkpoint import figures


def of_round(stall_s: float) -> dict[str, list[float]]:
    return {
        "first_stall_s": [0.3],
        "stall_s": [stall_s, 9 * stall_s, stall_s],
        "write_s": [0.5],
        "torch_save_s": [0.4],
        "ray_train_s": [2.0],
        "resume_s": [1.0],
        "megabytes": [274.0],
    }


def test_a_ratio_is_the_median_of_the_ratios_of_the_rounds() -> None:
    values = figures([of_round(0.1), of_round(0.2), of_round(0.05)])
    assert values["stall_ratio_vs_torch_save"] == pytest.approx(4)
    assert values["stall_ratio_vs_ray_train"] == pytest.approx(20)
    assert values["write_mb_s"] == pytest.approx(548)
    assert values["stall_s"] == pytest.approx(0.1)
