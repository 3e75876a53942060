"""Workers that cannot start, after others were lost: when the run goes on, and when it ends."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from datapipe.errors import UnreadableUrl
from tests.recorded import Announcing, Planned, Recording, kills, recorded_strategy
from tests.small_runs import NUM_TRAIN, causes, run, saved_step, small_config
from xdist.config import ClusterConfig, TrainConfig
from xdist.errors import NotEnoughResources
from xdist.topologies import restarts

pytestmark = [
    pytest.mark.faults,
    pytest.mark.ray,
    pytest.mark.timeout(120),
    pytest.mark.usefixtures("cluster"),
]


def config_of(directory: Path, **changes: Any) -> TrainConfig:
    config = small_config(directory, strategy="all_reduce", **changes)
    return replace(config, batch_size=12, num_lanes=12, num_epochs=6)


def recorded(make_strategy: Any, directory: Path, *planned: Planned) -> Any:
    """Topologies whose strategies are made by `make_strategy(directory, planned, ...)`."""
    directory.mkdir()
    make_strategy = partial(make_strategy, directory, planned, 0, 0, 0, "", {})
    return {"all_reduce": partial(Announcing, directory=directory, make_strategy=make_strategy)}


def fails_once(directory: Path, *arguments: Any, number: int, **named: Any) -> Any:
    """Worker 1, when all were lost: as where the storage of the checkpoint does not answer."""
    are_lost = all((directory / f"kill-{worker}-10").exists() for worker in (0, 1))
    marker = directory / "failed"
    if number == 1 and are_lost and named["checkpoint_url"] is not None and not marker.exists():
        marker.touch()
        raise UnreadableUrl(named["checkpoint_url"], "503 Slow Down")
    return recorded_strategy(directory, *arguments, number=number, **named)


def test_a_start_that_fails_once_after_all_were_lost_is_tried_again(tmp_path: Path) -> None:
    config, directory = config_of(tmp_path), tmp_path / "recording"
    topologies = recorded(fails_once, directory, kills(0, 10), kills(1, 10))
    run(config, tmp_path / "run", topologies=topologies)
    assert (directory / "failed").exists()
    assert sorted(causes(tmp_path / "run")) == ["worker 0 lost", "worker 1 lost"]


def never_again(directory: Path, *arguments: Any, **named: Any) -> Any:
    if (directory / "kill-1-5").exists():
        raise OSError("this node lacks something")
    return recorded_strategy(directory, *arguments, **named)


def test_survivors_do_not_wait_for_ever_for_who_cannot_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is tried again more often than `wait_s` would notice."""
    monkeypatch.setattr(restarts, "LONGEST_WAIT_S", 1.0)
    config = config_of(tmp_path, cluster=ClusterConfig(min_world_size=2, wait_s=4))
    topologies = recorded(never_again, tmp_path / "recording", kills(1, 5))
    with pytest.raises(NotEnoughResources, match="room for 1 workers that can start") as caught:
        run(config, tmp_path / "run", topologies=topologies)
    assert "the last one that could not start: " in str(caught.value)
    assert "in never_again" in str(caught.value)
    assert str(caught.value).endswith("OSError: this node lacks something")
    # What the survivor has is saved first.
    recording = Recording(tmp_path / "recording")
    assert saved_step(tmp_path / "run") == max(recording.steps())


def sends_slowly(*arguments: Any, **named: Any) -> Any:
    """The state takes 14 s on its way from one worker to another: more than workers wait for one
    another otherwise.
    """
    import threading

    from xdist.strategies import group

    strategy = recorded_strategy(*arguments, **named)
    inner, never = strategy.strategy, threading.Event()
    state = [*inner._state.tensors().values(), *inner._statistics.tensors().values()]
    size = sum(map(len, state))
    group.PIECE = size // 64
    send = group.Group.send

    def send_slowly(self: Any, tensor: Any, *, to: int) -> None:
        for piece in tensor.split(group.PIECE):
            never.wait(14.0 * len(piece) / size)
            send(self, piece, to=to)

    group.Group.send = send_slowly  # type: ignore[method-assign]
    return strategy


@pytest.mark.by_hand
def test_nobody_is_lost_while_the_state_is_on_a_slow_way(tmp_path: Path) -> None:
    config, directory = config_of(tmp_path, num_workers=3), tmp_path / "recording"
    topologies = recorded(sends_slowly, directory, kills(1, 10), kills(2, 10))
    run(config, tmp_path / "run", topologies=topologies)
    Recording(directory).check(num_samples=NUM_TRAIN, num_epochs=config.num_epochs)
    assert sorted(causes(tmp_path / "run")) == ["worker 1 lost", "worker 2 lost"]
