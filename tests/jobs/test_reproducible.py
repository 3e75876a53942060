"""The same run twice, and where its time goes."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch

from tests.jobs.small_jobs import data_options, main
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


@pytest.mark.usefixtures("cluster")
def test_a_profiled_job_leaves_a_trace_and_where_the_time_went(tmp_path: Path) -> None:
    options = ["--profile", "--max-steps", "12", "--run-dir", str(tmp_path / "run")]
    assert main([*data_options(tmp_path), *options]) == 0
    trace = json.loads(gzip.decompress((tmp_path / "run/profile/trace.json.gz").read_bytes()))
    assert trace["traceEvents"]
    table = (tmp_path / "run/profile/steps.txt").read_text()
    for phase in ("data wait", "forward", "backward", "all-reduce", "optimizer"):
        assert phase in table
    assert "all-reduce, waited for" in (tmp_path / "run" / "log.txt").read_text()
