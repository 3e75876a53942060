"""The built-in data set as a job's default."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
from built_in import make_scenes

from datapipe.scenes.making import ScenesConfig, ensure_scenes
from xdist.errors import UserError


def test_another_node_makes_the_scenes_at_the_path_of_this_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "here" / ".cache" / "xdist"
    few = ScenesConfig(num_train=2, num_evaluation=1, image_size=16)
    made = ensure_scenes(cache, few).train.parent
    made.rename(cache / ScenesConfig().directory_name())
    monkeypatch.setenv("HOME", str(tmp_path / "here"))
    here, sent = make_scenes(), pickle.dumps(make_scenes)
    monkeypatch.setenv("HOME", str(tmp_path / "there"))
    assert pickle.loads(sent)() == here
    assert here.train.is_relative_to(cache)


@pytest.mark.parametrize("home", ["file/home", "~"])
def test_without_a_home_that_can_be_written_it_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, home: str
) -> None:
    """A home of `~` is how Python sees a user without one."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("HOME", home if home == "~" else str(tmp_path / home))
    with pytest.raises(UserError, match=r"cannot be written below ~/.cache/xdist: .*; set HOME"):
        make_scenes()
