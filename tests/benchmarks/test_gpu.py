"""The benchmark of GPUs on a CPU: what it says, not how fast it is."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.clusters import ROOT

SMALL = ["--device=cpu", "--image-size=48", "--batch-size=4", "--steps=2", "--width=0.125"]
FOREIGN = {"ray", "pyarrow", "fsspec", "safetensors", "webdataset", "tyro", "rich"}


@pytest.mark.slow
def test_the_last_line_has_every_way() -> None:
    ways = ["default", "channels_last", "bfloat16", "accumulation", "clip_norm", "deterministic"]
    done = subprocess.run(
        [sys.executable, "-m", "tests.benchmarks.gpu", *SMALL, "--ways", *ways],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    values = json.loads(done.stdout.splitlines()[-1])
    assert values["device"] == "cpu"
    assert [result["way"] for result in values["results"]] == ways
    for result in values["results"]:
        assert "error" not in result, result
        assert result["images_s"] > 0
        assert {"forward", "backward", "optimizer"} < result["phases_ms"].keys()


def test_it_needs_torch_and_numpy_alone() -> None:
    code = f"import sys, tests.benchmarks.gpu; print({FOREIGN} & set(sys.modules))"
    output = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=True)
    assert output.stdout.decode().strip() == "set()"
