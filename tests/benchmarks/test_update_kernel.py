"""The benchmark of the update on a small network: what it says, not how fast it is."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from tests.benchmarks.update_kernel import Vectors, flat, foreach, one_pass, optim
from tests.clusters import ROOT
from xdist import native_update

WAYS = {"kernel", "kernel_bfloat16", "torch_foreach", "torch_optim", "torch_flat"}
RATIOS = {"kernel_ratio_vs_torch", "kernel_ratio_vs_torch_optim"}


def test_all_ways_make_the_same_update() -> None:
    """foreach to the bit; the others fuse operations, so within their rounding."""
    results = {}
    for make in (lambda vectors: one_pass(vectors, vectors.gradients), foreach, optim, flat):
        vectors = Vectors(width=0.125)
        update = make(vectors).update
        for _ in range(2):
            update()
        results[make] = vectors.weights, vectors.average
    (weights, average), same, *close = results.values()
    assert torch.equal(same[0], weights)
    assert torch.equal(same[1], average)
    for other in close:
        torch.testing.assert_close(other, (weights, average), rtol=1e-6, atol=1e-8)


@pytest.mark.slow
@pytest.mark.skipif(not native_update.is_available(), reason="native/update.c is not built")
def test_the_last_line_has_every_way() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.benchmarks.update_kernel", "--rounds=1", "--width=0.125"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    values = json.loads(done.stdout.splitlines()[-1])
    rates = {f"{way}_updates_s{cores}" for way in WAYS for cores in ("", "_1")}
    assert values.keys() == rates | RATIOS | {"num_weights", "num_cores"}
    assert all(value > 0 for value in values.values())
