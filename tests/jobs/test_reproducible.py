"""The same run twice."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.jobs.test_jobs import data_options, main
from xdist import checkpoint

pytestmark = [pytest.mark.ray, pytest.mark.timeout(240), pytest.mark.long]


@pytest.mark.usefixtures("cluster")
def test_two_deterministic_runs_are_equal_to_the_bit(tmp_path: Path) -> None:
    data = data_options(tmp_path)
    weights = []
    for name in ("first", "second"):
        run_dir = str(tmp_path / name)
        options = ["--deterministic", "--model.dropout", "0.5", "--max-steps", "12"]
        assert main([*data, *options, "--run-dir", run_dir]) == 0
        last = checkpoint.latest(run_dir)
        assert last is not None
        assert last.manifest.cut.step == 12
        weights.append(last.read_range(0, last.manifest.layout.num_weights))
    first, second = weights
    for tensor_name, tensor in first.items():
        assert torch.equal(tensor, second[tensor_name])
