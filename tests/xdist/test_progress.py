"""What a person sees of a running job."""

from __future__ import annotations

import io
import logging
from typing import Any

import pytest
from rich.console import Console

from xdist.progress import ProgressDisplay

RECORD: dict[str, Any] = {
    "epoch": 1.25,
    "step": 125,
    "samples": 4000,
    "loss": 0.5,
    "learning_rate": 0.045,
    "samples_per_s": 320.0,
    "num_workers": 4,
    "data_wait_s": 0.25,
    "step_s": 1.0,
    "staleness_mean": 3.5,
    "recoveries": 2,
}
FACTS = (
    "epoch=1.25 step=125 samples=4000 loss=0.5000 learning_rate=0.045 samples_per_s=320 workers=4 "
    "per_worker=80 data_wait=25% staleness=3.5 recoveries=2 map100=0.400 map100_raw=0.300"
)


def show(display: ProgressDisplay) -> None:
    with display:
        display.score("average", {"map100": 0.4, "map100_prevalence": 0.1})
        display.score("raw", {"map100": 0.3})
        display.train(RECORD)


def test_a_log_gets_a_line_with_all_that_is_known(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="xdist")
    console = Console(file=io.StringIO(), force_terminal=False)
    show(ProgressDisplay(num_places=8000, num_done=0, console=console))
    [line] = caplog.messages
    assert line.startswith(f"{FACTS} eta=")


def test_a_terminal_shows_the_same_above_a_bar_however_narrow_it_is() -> None:
    written = io.StringIO()
    console = Console(file=written, force_terminal=True, width=60, color_system=None)
    show(ProgressDisplay(num_places=8000, num_done=0, console=console))
    last = written.getvalue().split("epoch=")[-1]
    assert "epoch=" + " ".join(last.split("epoch 1.25")[0].split()) == FACTS
    assert " 50% " in last


def test_what_is_not_known_is_not_shown(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="xdist")
    display = ProgressDisplay(num_places=8000, num_done=0, console=Console(file=io.StringIO()))
    display.train({**RECORD, "loss": None, "staleness_mean": None, "recoveries": 0})
    [line] = caplog.messages
    assert "loss=nan" in line
    assert "staleness" not in line
    assert "recoveries" not in line
