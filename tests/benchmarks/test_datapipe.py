"""make bench-datapipe on a small setting, without peers: what it says, not how fast it is."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.clusters import ROOT
from tests.datapipe.small_sets import encode

SMALL = {
    "copies": 4,
    "shard-mb": 1,
    "rounds": 1,
    "images": 16,
    "warm-up-images": 8,
    "image-size": 32,
    "batch-size": 8,
}
OURS = {
    "ratio_vs_webdataset",
    "ratio_plain_shards",
    "ratio_fallback",
    "ratio_vs_stock_float32_wall",
    "ratio_vs_stock_float32_cpu",
    "eval_ratio",
    "webdataset_images_s",
    "ours_images_s",
    "ours_plain_images_s",
    "ours_fallback_images_s",
    "stock_evaluation_images_s",
    "ours_evaluation_images_s",
    "stock_float32_wall_images_s",
    "ours_wall_images_s",
}
OF_PEERS = {"ratio_vs_mosaic", "ratio_vs_litdata", "mosaic_images_s", "litdata_images_s"}


@pytest.mark.by_hand
@pytest.mark.timeout(240)
def test_the_last_line_has_every_figure(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    for number in range(6):  # of noise, which takes 100 KB: enough shards for two workers
        image = Image.fromarray(generator.integers(0, 256, (320, 320, 3)).astype(np.uint8))
        (tmp_path / f"{number}.jpg").write_bytes(encode(image))
    options = [f"--source={tmp_path}", "--no-peers", *(f"--{key}={SMALL[key]}" for key in SMALL)]
    done = subprocess.run(
        [sys.executable, "-m", "tests.benchmarks.datapipe", *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert not done.returncode, done.stderr
    values = json.loads(done.stdout.splitlines()[-1])
    assert values.keys() == OURS | OF_PEERS | {"pixel_diff_mean", "kernel"}
    assert all(values[name] > 0 for name in OURS)
    assert all(values[name] is None for name in OF_PEERS)
    assert 0 <= values["pixel_diff_mean"] < 1
