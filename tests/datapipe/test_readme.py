"""The README's example of datapipe as a library."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from datapipe.position import Position
from tests.clusters import ROOT
from tests.datapipe.small_sets import write_set


def test_the_example_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_set(tmp_path / "data/photos/train", num_samples=5, samples_per_shard=None)
    monkeypatch.chdir(tmp_path)
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    names: dict[str, Any] = {}
    exec(example.replace("num_epochs=90", "num_epochs=2"), names)
    assert names["batch"].images.shape == (64, 224, 224, 3)
    assert Position.from_json(json.loads(names["resume"])) == Position(epoch=2)
